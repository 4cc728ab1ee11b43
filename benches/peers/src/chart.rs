//! The rates as a picture: for each case the peers' beside coney's, which is the line in the middle.

use std::path::Path;

use plotters::prelude::*;

use crate::clients::Client;
use crate::measure::Result;
use crate::report::{Ratio, Row};

const WIDTH: u32 = 960;
const ROW: u32 = 26;
/// Caption and scale.
const FRAME: u32 = 95;
const LEGEND: u32 = 30;
/// Names of cases.
const NAMES: u32 = 190;

/// One line for each case; a dot for each peer at the median of its rounds, a stroke from the least to the most. The scale
/// is logarithmic: twice as fast is as far to the right as half as fast is to the left.
pub fn draw(file: &Path, rows: &[Row]) -> Result<()> {
    let height = FRAME + ROW * u32::try_from(rows.len())?;
    let root = SVGBackend::new(file, (WIDTH, height + LEGEND)).into_drawing_area();
    root.fill(&WHITE)?;
    let (area, legend) = root.split_vertically(height);
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
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(16)
        .x_label_formatter(&|rate| format!("{rate}"))
        .draw()?;
    let text = ("sans-serif", 14).into_font().color(&BLACK);
    for (line, row) in rows.iter().enumerate() {
        let (_, y) = chart.backend_coord(&(1.0, middle(lines, line)));
        area.draw_text(&row.case, &text, (16, y - 7))?;
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
        chart.draw_series(dots)?;
        let left = i32::try_from(NAMES)? + 150 * i32::try_from(number)?;
        legend.draw(&Circle::new((left, 10), 4, colour.filled()))?;
        legend.draw_text(peer.name(), &text, (left + 10, 3))?;
    }
    root.present()?;
    Ok(())
}

/// Where a line's middle is: the first is at the top.
fn middle(lines: f64, line: usize) -> f64 {
    lines - line as f64 - 0.5
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;

    use super::*;

    #[test]
    fn a_peer_that_is_there_has_a_dot_and_one_that_is_not_has_none() {
        let ratios = BTreeMap::from([("lapin", Ratio { min: 0.5, median: 1.0, max: 4.0 })]);
        let row = Row {
            case: "get 100B".to_owned(),
            broker: "embedded",
            coney: None,
            peers: BTreeMap::new(),
            ratios,
            cpu_ratios: BTreeMap::new(),
        };
        let file = std::env::temp_dir().join(format!("coney-peers-{}.svg", std::process::id()));
        draw(&file, &[row]).unwrap();
        let svg = fs::read_to_string(&file).unwrap();
        fs::remove_file(&file).unwrap();
        assert!(svg.contains("get 100B"), "{svg}");
        // One for each peer in the legend.
        assert_eq!(svg.matches("<circle").count(), Client::PEERS.len() + 1, "{svg}");
    }
}
