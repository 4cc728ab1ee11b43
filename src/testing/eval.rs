//! Asking the node in its own language.
//!
//! `erl_call` joins the node as a hidden peer, evaluates what it reads, and leaves, in a few milliseconds. `rabbitmqctl`
//! boots an Erlang machine of its own for each question, which takes over a second, and listens on all addresses meanwhile.
//!
//! What is evaluated are functions of RabbitMQ that are documented nowhere. They are those that the commands of
//! `rabbitmqctl` call, and that 3.10 and 4.x have in common; where names have changed, the new one is tried first.

use std::io::{Read, Write};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::error::{NodeError, Result, failed_to};
use super::node::Node;

/// The node evaluates `@source@`, which must give a list of rows, each a list of fields, and prints one line per row
/// with a tab between fields. Every byte that is not a plain character is escaped as in URLs, so that neither tabs in
/// names nor their character set can be misread.
///
/// The source is scanned and parsed here, on the node, because `erl_call` has no words for a syntax error. While it
/// runs, its output belongs to the node and not to us: the processes it starts inherit that, and live longer than we.
const WRAPPER: &str = r#"
Ours = group_leader(),
case whereis(user) of undefined -> ok; User -> group_leader(User, self()) end,
Print = fun(Term) -> unicode:characters_to_binary(io_lib:format("~0tp", [Term])) end,
Result = try
    {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(@source@)),
    case erl_parse:parse_exprs(Tokens) of
        {ok, Parsed} ->
            {value, Value, _} = erl_eval:exprs(Parsed, [{'Print', Print}]),
            [[<<"ok">>] | Value];
        {error, {_, Module, What}} ->
            [[<<"failed">>, unicode:characters_to_binary(Module:format_error(What))]]
    end
catch Class:Reason -> [[<<"failed">>, Print({Class, Reason})]]
end,
group_leader(Ours, self()),
Text = fun (Field) when is_binary(Field) -> Field;
           (Field) when is_atom(Field) -> atom_to_binary(Field, utf8);
           (Field) when is_integer(Field) -> integer_to_binary(Field);
           (Field) when is_list(Field) -> unicode:characters_to_binary(Field);
           (Field) when is_pid(Field) -> list_to_binary(pid_to_list(Field));
           (Field) -> Print(Field)
       end,
Plain = fun(Field) ->
    [if Byte > 32, Byte < 127, Byte =/= $% -> Byte; true -> io_lib:format("%~2.16.0B", [Byte]) end
     || <<Byte>> <= Text(Field)]
end,
io:put_chars([[lists:join($\t, [Plain(Field) || Field <- Row]), $\n] || Row <- Result]).
"#;

impl Node {
    /// The value of an expression, printed.
    pub(super) fn value(&self, expression: &str) -> Result<String> {
        // On lines of their own, so that a comment at the end hides nothing of ours.
        let expression = expression.trim().trim_end_matches('.');
        let source = format!("[[Print(begin\n{expression}\nend)]]");
        let rows = self.evaluate_as(expression, &source, self.settings.timeout)?;
        Ok(rows.into_iter().flatten().next().unwrap_or_default())
    }

    /// The rows an expression gives.
    pub(super) fn rows(&self, expression: &str) -> Result<Vec<Vec<String>>> {
        self.evaluate(expression, self.settings.timeout)
    }

    /// Evaluates an expression for its effect.
    pub(super) fn run(&self, expression: &str) -> Result<()> {
        self.evaluate_as(expression, &format!("begin {expression} end, []"), self.settings.timeout).map(drop)
    }

    pub(super) fn evaluate(&self, source: &str, timeout: Duration) -> Result<Vec<Vec<String>>> {
        self.evaluate_as(source, source, timeout)
    }

    /// Evaluates `source`; what goes wrong is said of `expression`, which it was made from.
    fn evaluate_as(&self, expression: &str, source: &str, timeout: Duration) -> Result<Vec<Vec<String>>> {
        self.refuse_if_paused("ask the node")?;
        let failed = |reason: String| NodeError::Eval { expression: expression.trim().to_owned(), reason };
        let source = WRAPPER.replace("@source@", &binary(&format!("{source}.")));
        let mut call = self
            .home
            .erl_call()
            .args(["-sname", &self.name])
            // A name for itself by the node's leave: calls of several threads do not collide.
            .arg("-R")
            // Ours is kept below. This one ends the call if we are not there to keep it.
            .args(["-timeout", &(timeout.as_secs() + 1).to_string()])
            .args(["-fetch_stdout", "-no_result_term", "-e"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed_to("start erl_call"))?;
        let (mut input, mut output, mut complaints) = (call.stdin.take(), call.stdout.take(), call.stderr.take());
        let (sender, answer) = mpsc::channel();
        // On a thread, since reading a pipe knows no deadline. It ends with the call.
        let reader = thread::Builder::new()
            .name("coney-erl-call".into())
            .spawn(move || {
                // A call that ends before it has read everything says why on its standard error.
                let _ = input.take().map(|mut pipe| pipe.write_all(source.as_bytes()));
                let (mut text, mut error) = (String::new(), String::new());
                let _ = output.as_mut().map(|pipe| pipe.read_to_string(&mut text));
                let _ = complaints.as_mut().map(|pipe| pipe.read_to_string(&mut error));
                let _ = sender.send((text, error));
            })
            .map_err(failed_to("start a thread"))?;
        let answer = answer.recv_timeout(timeout);
        if answer.is_err() {
            let _ = call.kill();
        }
        let ended = call.wait().map_err(failed_to("wait for erl_call"));
        let _ = reader.join();
        let Ok((text, error)) = answer else {
            return Err(NodeError::Timeout { what: format!("evaluating `{expression}`"), after: timeout });
        };
        let mut rows = text.lines().map(|line| line.split('\t').map(plain).collect::<Vec<_>>());
        match rows.next() {
            Some(first) if first.first().is_some_and(|word| word == "ok") => Ok(rows.collect()),
            Some(first) => Err(failed(first.into_iter().nth(1).unwrap_or_default())),
            None => Err(failed(format!("erl_call {}: {}", ended?, error.trim()))),
        }
    }
}

/// Text as an Erlang binary in UTF-8: readable if it is plain, else as numbers, which need no escaping.
pub(super) fn binary(text: &str) -> String {
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\') {
        return format!("<<\"{text}\">>");
    }
    let bytes: Vec<String> = text.bytes().map(|byte| byte.to_string()).collect();
    format!("<<{}>>", bytes.join(","))
}

/// Undoes the escaping of one field.
fn plain(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let code = (byte == b'%')
            .then(|| tail.get(..2))
            .flatten()
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            None => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::{binary, plain};

    #[test]
    fn text_becomes_a_binary_that_needs_no_escaping() {
        assert_eq!(binary("a queue"), "<<\"a queue\">>");
        assert_eq!(binary(""), "<<\"\">>");
        assert_eq!(binary("\"\\"), "<<34,92>>");
        assert_eq!(binary("\u{e4}\n"), "<<195,164,10>>");
    }

    #[test]
    fn fields_are_unescaped() {
        assert_eq!(plain("a%20b%09%25%C3%A4"), "a b\t%\u{e4}");
        // The node escapes every percent sign; what is no escape is left alone.
        assert_eq!(plain("%"), "%");
        assert_eq!(plain("%zz"), "%zz");
    }
}
