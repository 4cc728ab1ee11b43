//! The rates as a picture: for each case the peers' beside coney's, which is the line in the middle.

use std::path::Path;

use plotters::prelude::*;

use crate::clients::Client;
use crate::measure::Result;
use crate::report::{Ratio, Row};

const WIDTH: u32 = 960;
const ROW: u32 = 26;
/// Caption, scale and legend.
const FRAME: u32 = 130;
/// Names of cases.
const NAMES: u32 = 190;

/// One line for each case; a dot for each peer at the median of its rounds, a stroke from the least to the most. The scale
/// is logarithmic: twice as fast is as far to the right as half as fast is to the left.
pub fn draw(file: &Path, rows: &[Row]) -> Result<()> {
    let height = FRAME + ROW * u32::try_from(rows.len())?;
    let area = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let bound = |range: fn(&Ratio) -> f64, pick: fn(f64, f64) -> f64| {
        rows.iter().flat_map(|row| row.ratios.values()).map(range).fold(1.0, pick)
    };
    // coney : peer upside down, with room at both ends.
    let low = 1.0 / bound(|ratio| ratio.max, f64::max) / 1.5;
    let high = 1.0 / bound(|ratio| ratio.min, f64::min) * 1.5;
    let lines = rows.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption("Messages per second, coney = 1 (to the right: faster than coney)", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(NAMES)
        .build_cartesian_2d((low..high).log_scale(), 0.0..lines)?;
    chart.configure_mesh().disable_y_mesh().y_labels(0).x_label_formatter(&|rate| format!("{rate}")).draw()?;
    let name_style = ("sans-serif", 14).into_font().color(&BLACK);
    for (line, row) in rows.iter().enumerate() {
        let (_, y) = chart.backend_coord(&(1.0, middle(lines, line)));
        area.draw_text(&row.case, &name_style, (16, y - 7))?;
        let rule = PathElement::new([(low, lines - line as f64), (high, lines - line as f64)], BLACK.mix(0.1));
        chart.draw_series([rule])?;
    }
    chart.draw_series([PathElement::new([(1.0, 0.0), (1.0, lines)], BLACK.stroke_width(2))])?;
    for (number, peer) in Client::PEERS.into_iter().enumerate() {
        let colour = Palette99::pick(number).to_rgba();
        let there = rows.iter().enumerate().filter_map(|(line, row)| Some((line, row.ratios.get(peer.name())?)));
        // Side by side, so that equals can be told apart.
        let y = |line| middle(lines, line) + (2.0 - number as f64) * 0.16;
        let strokes = there
            .clone()
            .map(|(line, ratio)| PathElement::new([(1.0 / ratio.max, y(line)), (1.0 / ratio.min, y(line))], colour));
        chart.draw_series(strokes)?;
        let dots = there.map(|(line, ratio)| Circle::new((1.0 / ratio.median, y(line)), 4, colour.filled()));
        chart.draw_series(dots)?.label(peer.name()).legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
    }
    let mut labels = chart.configure_series_labels();
    labels
        .position(SeriesLabelPosition::LowerLeft)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

/// Where a line's middle is: the first is at the top.
fn middle(lines: f64, line: usize) -> f64 {
    lines - line as f64 - 0.5
}
