//! `fastkv report`: the page and its pictures, held to the files they were drawn from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::support::{Scratch, assert_well_formed, floats, json_of, needle, read_json, refused, stdout_of};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/results")
}

/// The page and the pictures of a directory.
struct Drawn {
    html: String,
    pictures: BTreeMap<String, String>,
}

fn draw(directory: &Path) -> Drawn {
    let scratch = Scratch::new();
    let (page, pictures) = (scratch.path("page.html"), scratch.path("pictures"));
    let arguments = ["report".as_ref(), directory.as_os_str(), "--out".as_ref(), page.as_os_str()];
    stdout_of(arguments.into_iter().chain(["--svg".as_ref(), pictures.as_os_str()]));
    let files = fs::read_dir(&pictures).expect("pictures").map(|entry| entry.expect("a file").path());
    let text = |path: &Path| fs::read_to_string(path).expect("UTF-8");
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    Drawn { html: text(&page), pictures: files.map(|path| (name(&path), text(&path))).collect() }
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<(&'a str, &'a str)> {
    let (_, rest) = text.split_once(start)?;
    rest.split_once(end)
}

/// All pieces of a text between two marks.
fn pieces<'a>(mut text: &'a str, start: &str, end: &str) -> Vec<&'a str> {
    let mut pieces = Vec::new();
    while let Some((piece, rest)) = between(text, start, end) {
        pieces.push(piece);
        text = rest;
    }
    pieces
}

/// The text of an element such as `<td class="w">text</td>`.
fn texts(text: &str, element: &str) -> Vec<String> {
    let inside = |piece: &str| piece.split_once('>').map(|(_, text)| text.to_owned());
    let mut found = pieces(text, &format!("<{element}"), &format!("</{element}>"));
    found.retain(|piece| piece.starts_with(['>', ' ']));
    found.into_iter().filter_map(inside).collect()
}

/// Rows of the tables whose caption begins so.
fn table(html: &str, caption: &str) -> Vec<Vec<String>> {
    let tables = pieces(html, "<table>", "</table>");
    let wanted = tables.into_iter().find(|table| texts(table, "caption")[0].starts_with(caption));
    let body = between(wanted.unwrap_or_else(|| panic!("no table {caption}")), "<tbody>", "</tbody>");
    pieces(body.expect("a body").0, "<tr>", "</tr>").into_iter().map(|row| texts(row, "td")).collect()
}

/// What a reader takes from a panel of lines: values of its axes at places, and marks.
#[derive(Default)]
struct Panel {
    x: Vec<(f64, String)>,
    y: Vec<(f64, String)>,
    /// What the pointer tells, place, and ends of the bar.
    marks: Vec<(String, [f64; 2], Option<[f64; 2]>)>,
}

fn number(text: &str) -> f64 {
    let digits =
        text.find(|char: char| !(char.is_ascii_digit() || "-.".contains(char))).unwrap_or(text.len());
    text[..digits].parse().unwrap_or_else(|_| panic!("a number begins {text:.30}"))
}

fn panel(svg: &str, title: &str) -> Panel {
    let start = format!("font-size=\"13\" text-anchor=\"start\">{title}</text>");
    let (_, rest) = svg.split_once(&start).unwrap_or_else(|| panic!("no panel {title}"));
    let text = rest.split("font-size=\"13\"").next().expect("some");
    let mut panel = Panel::default();
    for grid in pieces(text, "<path class=\"grid\" d=\"M", "</text>") {
        let (x, rest) = grid.split_once(' ').expect("two numbers");
        let label = grid.rsplit('>').next().expect("a label").to_owned();
        let end = rest.find(['V', 'H']).expect("a line");
        match &rest[end..=end] {
            "V" => panel.x.push((number(x), label)),
            _ => panel.y.push((number(rest), label)),
        }
    }
    for group in pieces(text, "<g>", "</g>") {
        let told = texts(group, "title").remove(0);
        let Some((mark, _)) = between(group, "mark\" d=\"M", "m") else { continue };
        let (x, y) = mark.split_once(' ').expect("two numbers");
        let bar = between(group, "curve\" d=\"M", "\"/>").map(|(bar, _)| {
            let (_, low) = bar.split_once(' ').expect("two numbers");
            [number(low), number(bar.split_once('V').expect("a line").1)]
        });
        panel.marks.push((told, [number(x), number(y)], bar));
    }
    panel
}

/// The value at a place of an axis, by the first and the last of its ticks.
fn value_at(ticks: &[(f64, String)], place: f64, logarithmic: bool) -> f64 {
    let value = |label: &str| match label.strip_suffix('K') {
        Some(thousands) => 1024.0 * number(thousands),
        None => number(label),
    };
    let [first, last] = [&ticks[0], &ticks[ticks.len() - 1]];
    let share = (place - first.0) / (last.0 - first.0);
    let [from, to] = [value(&first.1), value(&last.1)];
    match logarithmic {
        true => from * (to / from).powf(share),
        false => from + share * (to - from),
    }
}

fn assert_close(value: f64, expected: f64, what: &str) {
    // Places are written to hundredths of a pixel, and an axis is hundreds of them long.
    assert!((value - expected).abs() <= 1e-3 * expected.abs().max(0.2), "{what}: {value} is not {expected}");
}

#[test]
fn everything_is_well_formed_and_loads_nothing() {
    let drawn = draw(&fixtures());
    let names: Vec<&str> = drawn.pictures.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "answers-accuracy-1024.svg",
            "answers-accuracy-4096.svg",
            "answers-depth-depth_map.svg",
            "kept-kept.svg",
            "speed-memory.svg",
            "speed-speed.svg"
        ]
    );
    for text in drawn.pictures.values().chain([&drawn.html]) {
        assert_well_formed(text);
        for piece in ["<script", "src=", "url(", "@import", "<link", "http-equiv"] {
            assert!(!text.contains(piece), "{piece}");
        }
        let addresses: Vec<&str> = pieces(text, "http://", "\"");
        assert!(addresses.iter().all(|address| address.starts_with("www.w3.org/")), "{addresses:?}");
        assert!(text.contains("prefers-color-scheme:dark"));
    }
    for picture in drawn.pictures.values() {
        assert!(drawn.html.contains(picture.as_str()), "the page has every picture");
    }
    assert!(drawn.html.contains("README.md has no first field"), "what is passed over is told");
}

#[test]
fn tables_and_points_are_those_of_the_bench() {
    let drawn = draw(&fixtures());
    let bench = read_json(&fixtures().join("speed.json"));
    let measured = bench["measured"].as_array().expect("rows");
    let rows = table(&drawn.html, "What was measured");
    assert_eq!(rows.len(), measured.len());
    let svg = &drawn.pictures["speed-speed.svg"];
    let [ttft, speed_up, decode] =
        ["Time to first token, s", "Speed-up over full context", "Decoding, tokens/s"]
            .map(|title| panel(svg, title));
    assert_eq!(ttft.x.iter().map(|tick| tick.1.as_str()).collect::<Vec<_>>(), ["8K", "32K", "128K"]);
    let memory = panel(&drawn.pictures["speed-memory.svg"], "Device memory at its most, GiB");
    let mut decoded = 0;
    for (row, cells) in measured.iter().zip(&rows) {
        let tokens = row["tokens"].as_f64().expect("a number");
        let policy = row["policy"].as_str().expect("a name");
        let at = format!("{}K", tokens / 1024.0);
        assert_eq!([cells[0].as_str(), &cells[1], &cells[2]], [policy, &at, "3"]);
        let mut runs = floats(&row["ttft_runs_s"]);
        runs.sort_by(f64::total_cmp);
        // Three digits.
        let near = |cell: &str, value: f64| {
            assert!((number(cell) / value - 1.0).abs() < 5.1e-3, "{cell} is not {value}");
        };
        near(&cells[3], runs[1]);
        let (least, most) = cells[4].split_once('–').expect("a range");
        near(least, runs[0]);
        near(most, runs[2]);
        near(&cells[5], row["ttft_speedup"].as_f64().expect("a number"));
        near(&cells[6], row["flop_bound"].as_f64().expect("a number"));
        let full = row["kv_full_bytes"].as_f64().expect("bytes");
        let gib = |field: &str| row[field].as_f64().expect("bytes") / 1024_f64.powi(3);
        near(&cells[10], gib("kv_kept_bytes"));
        assert_eq!(cells[11], format!("{:.1}", 100.0 * row["kv_kept_bytes"].as_f64().expect("bytes") / full));
        near(&cells[12], gib("kv_peak_bytes"));
        near(&cells[13], gib("memory_peak_bytes"));

        let mark = |panel: &Panel, value: f64, logarithmic: bool| {
            let own = panel.marks.iter().filter(|(told, ..)| {
                told.starts_with(&format!("{policy}: ")) && told.contains(&format!(" at {at}"))
            });
            let [(_, [x, y], bar)] = own.collect::<Vec<_>>()[..] else {
                panic!("one mark of {policy} at {at}")
            };
            assert_close(value_at(&panel.x, *x, true), tokens, "tokens");
            assert_close(value_at(&panel.y, *y, logarithmic), value, policy);
            bar.map(|bar| bar.map(|end| value_at(&panel.y, end, logarithmic)))
        };
        let [low, high] = mark(&ttft, runs[1], true).expect("a bar");
        assert_close(low, runs[0], "least");
        assert_close(high, runs[2], "most");
        mark(&speed_up, row["ttft_speedup"].as_f64().expect("a number"), false);
        mark(&memory, gib("memory_peak_bytes"), false);
        if let Some(rate) = row["decode_tokens_per_s"].as_f64() {
            mark(&decode, rate, false);
            near(&cells[8], rate);
            decoded += 1;
        } else {
            assert_eq!(cells[8], "–");
        }
    }
    assert_eq!([ttft.marks.len(), decode.marks.len()], [9, decoded], "and nothing else");
    let stages = table(&drawn.html, "Seconds of a prefill by stage");
    let seconds: Vec<f64> = stages[0][2..].iter().map(|cell| number(cell)).collect();
    assert_eq!((stages.len(), &stages[0][..2]), (1, &["full".to_owned(), "8K".to_owned()][..]));
    assert_eq!(seconds, [0.031, 0.168, 0.0, 0.0, 0.0, 0.0041]);
    let skipped = table(&drawn.html, "Not measured");
    assert_eq!(skipped[0][..2], ["h2o", "8K"]);
}

/// The answers of the fixture.
fn answers() -> Vec<Value> {
    let text = fs::read_to_string(fixtures().join("answers.jsonl")).expect("UTF-8");
    text.lines().skip(1).map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn mean(answers: &[&Value], field: impl Fn(&Value) -> f64) -> f64 {
    answers.iter().map(|answer| field(answer)).sum::<f64>() / answers.len() as f64
}

/// The three fastkv arms of the fixture have two names: one has other options than a budget.
fn name_of(answer: &Value) -> String {
    let policy = answer["policy"].as_str().expect("a name");
    if answer["options"]["tsp_layer"] == 2 { format!("{policy} (2)") } else { policy.to_owned() }
}

fn budget_of(answer: &Value) -> String {
    if answer["retention"].is_null() { String::new() } else { answer["retention"].to_string() }
}

#[test]
fn scores_are_the_means_of_the_answers() {
    let drawn = draw(&fixtures());
    let answers = answers();
    let rows = table(&drawn.html, "Mean scores");
    assert_eq!(rows.len(), 2 * 2 * 5);
    for cells in &rows {
        let tokens = 1024.0 * number(&cells[0]);
        let own: Vec<&Value> = answers
            .iter()
            .filter(|answer| answer["tokens"].as_f64() == Some(tokens) && answer["task"] == cells[1].as_str())
            .filter(|answer| name_of(answer) == cells[2] && budget_of(answer) == cells[3])
            .collect();
        assert_eq!(cells[4], own.len().to_string(), "{cells:?}");
        let score = mean(&own, |answer| answer["score"].as_f64().expect("a score"));
        assert_eq!(cells[5], format!("{score:.1}"));
        let exact = mean(&own, |answer| f64::from(u8::from(answer["exact"] == true)));
        assert_eq!(cells[7], format!("{:.1}", 100.0 * exact));
        let kept = |answer: &Value| {
            answer["kv_kept_bytes"].as_f64().expect("bytes")
                / answer["kv_full_bytes"].as_f64().expect("bytes")
        };
        let kept = 100.0 * mean(&own, kept);
        assert_eq!(cells[8], format!("{kept:.1}"));

        let panel = panel(&drawn.pictures[&format!("answers-accuracy-{tokens}.svg")], &cells[1]);
        let here = panel.marks.iter().filter(|(told, [x, _], _)| {
            told.starts_with(&format!("{}: ", cells[2]))
                && (value_at(&panel.x, *x, true) / kept - 1.0).abs() < 0.01
        });
        let [(_, [_, y], bar)] = here.collect::<Vec<_>>()[..] else { panic!("one mark of {cells:?}") };
        assert_close(value_at(&panel.y, *y, false), score, "score");
        let (low, high) = cells[6].split_once('–').expect("an interval");
        let [from, to] = bar.expect("a bar").map(|end| value_at(&panel.y, end, false));
        assert!((from - number(low)).abs() < 0.2 && (to - number(high)).abs() < 0.2, "{cells:?}");
    }
}

#[test]
fn maps_of_depth_have_a_cell_for_each_mean() {
    let drawn = draw(&fixtures());
    let svg = &drawn.pictures["answers-depth-depth_map.svg"];
    let with_depth: Vec<Value> = answers().into_iter().filter(|answer| !answer["depth"].is_null()).collect();
    let mut cells = 0;
    for row in table(&drawn.html, "depth_map") {
        let depth = number(&row[2]) / 100.0;
        let title = if row[1].is_empty() { row[0].clone() } else { format!("{} {}", row[0], row[1]) };
        let start = format!("text-anchor=\"start\">{title}</text>");
        let panel =
            svg.split_once(&start).expect("a panel").1.split("font-size=\"13\"").next().expect("some");
        for (column, tokens) in [1024.0, 4096.0].into_iter().enumerate() {
            let own: Vec<&Value> = with_depth
                .iter()
                .filter(|answer| {
                    answer["tokens"].as_f64() == Some(tokens) && answer["depth"].as_f64() == Some(depth)
                })
                .filter(|answer| name_of(answer) == row[0] && budget_of(answer) == row[1])
                .collect();
            let label = format!("<title>{}K, {}: ", tokens / 1024.0, row[2]);
            if own.is_empty() {
                assert_eq!(row[3 + column], "–");
                assert!(panel.contains(&format!("{label}not asked")));
                continue;
            }
            let score = mean(&own, |answer| answer["score"].as_f64().expect("a score"));
            assert_eq!(row[3 + column], format!("{score:.1} (n = {})", own.len()));
            let (cell, _) = between(panel, &label, "</g>").expect("a cell");
            assert!(cell.starts_with(&format!("{score:.1} (n = {})", own.len())), "{cell}");
            assert!(cell.contains(&format!("fill-opacity=\"{:.3}\"", 0.06 + 0.94 * score / 100.0)), "{cell}");
            assert!(cell.contains(&format!(">{score:.0}</text>")), "{cell}");
            cells += 1;
        }
    }
    assert_eq!(cells, 5 * 3 * 2 - 1);
}

#[test]
fn kept_tokens_are_drawn_and_counted() {
    let drawn = draw(&fixtures());
    assert!(drawn.pictures["kept-kept.svg"].contains("layer 2, kv head 1: kept 5 of 10, mass 0.950"));
    let rows = table(&drawn.html, "Layers");
    assert_eq!(rows[1], ["1", "40", "9 9", "0.930 0.900", "10"]);
    // What the program writes itself can be read as well.
    let scratch = Scratch::new();
    let out = scratch.path("own.json");
    let model = needle();
    let words =
        "the magic number for quiet otter is 17 36 82 . question : the magic number for quiet otter is";
    let inspect = ["inspect", "--policy", "fastkv", "--model", model.to_str().expect("UTF-8"), words];
    stdout_of(inspect.into_iter().chain(["--out", out.to_str().expect("UTF-8")]));
    let own = read_json(&out);
    let rows = table(&draw(out.parent().expect("a directory")).html, "Layers");
    let reads: Vec<String> = own["rows"].as_array().expect("rows").iter().map(Value::to_string).collect();
    assert_eq!(rows.iter().map(|row| row[1].clone()).collect::<Vec<_>>(), reads);
}

#[test]
fn hostile_text_stays_text() {
    let scratch = Scratch::new();
    let hostile = "<script>alert(\"1\")</script>&'\u{7}\u{1b}[31m]]>";
    let poison = |value: &mut Value| *value = json!(hostile);
    let mut bench = read_json(&fixtures().join("speed.json"));
    for field in ["version", "model", "device", "device_reason"] {
        poison(&mut bench[field]);
    }
    for row in bench["measured"].as_array_mut().expect("rows") {
        poison(&mut row["policy"]);
        row["options"] = json!({ hostile: hostile });
    }
    poison(&mut bench["skipped"][0]["reason"]);
    scratch.file("a'b&<i>.json", bench.to_string());
    let text = fs::read_to_string(fixtures().join("answers.jsonl")).expect("UTF-8");
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    poison(&mut lines[0]["model"]);
    lines[0]["settings"][hostile] = json!(hostile);
    for line in &mut lines[1..] {
        for field in ["policy", "task", "retention"] {
            poison(&mut line[field]);
        }
    }
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    scratch.file("answers.jsonl", lines.join("\n"));
    let mut inspection = read_json(&fixtures().join("kept.json"));
    for field in ["model", "device", "policy"] {
        poison(&mut inspection[field]);
    }
    scratch.file("kept.json", inspection.to_string());
    scratch.file("<b>.txt", "nothing");

    let drawn = draw(scratch.path("kept.json").parent().expect("a directory"));
    assert_eq!(drawn.pictures.len(), 6);
    for text in drawn.pictures.values().chain([&drawn.html]) {
        assert_well_formed(text);
        assert!(!text.contains("<script") && !text.contains('\u{7}') && !text.contains('\u{1b}'));
    }
    assert!(
        drawn
            .html
            .contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;&#39;\u{fffd}\u{fffd}[31m")
    );
    let plain = |name: &String| name.chars().all(|char| char.is_ascii_alphanumeric() || "-_.".contains(char));
    assert!(drawn.pictures.keys().all(plain), "{:?}", drawn.pictures.keys());
}

/// A directory with one file of results that a change makes wrong.
fn assert_broken(fixture: &str, change: impl Fn(&str) -> String, parts: &[&str]) {
    let scratch = Scratch::new();
    let text = fs::read_to_string(fixtures().join(fixture)).expect("UTF-8");
    let changed = change(&text);
    assert_ne!(changed, text);
    let file = scratch.file(fixture, changed);
    let out = scratch.path("report.html");
    let directory = file.parent().expect("a directory");
    let arguments = ["report".as_ref(), directory.as_os_str(), "--out".as_ref(), out.as_os_str()];
    refused(arguments, 1, &[&[fixture], parts].concat());
    assert_eq!(scratch.names(), [fixture]);
}

#[test]
fn broken_results_are_told_with_file_and_line() {
    let line = |text: &str, number: usize, from: &str, to: &str| {
        let lines = text.lines().enumerate();
        let lines = lines.map(|(index, line)| match index + 1 == number {
            true => line.replacen(from, to, 1),
            false => line.to_owned(),
        });
        lines.collect::<Vec<_>>().join("\n") + "\n"
    };
    assert_broken("answers.jsonl", |text| line(text, 7, "{", ""), &["line 7"]);
    let cut = |text: &str| {
        let eighth = text.lines().nth(7).expect("a line");
        text.replace(eighth, &eighth[..eighth.len() - 20])
    };
    assert_broken("answers.jsonl", cut, &["line 8", "EOF"]);
    assert_broken(
        "answers.jsonl",
        |text| line(text, 9, "\"score\": ", "\"score\": -1"),
        &["line 9", "score is -1"],
    );
    assert_broken("answers.jsonl", |text| line(text, 3, "\"task\"", "\"tusk\""), &["line 3", "`task`"]);
    assert_broken(
        "answers.jsonl",
        |text| line(text, 1, "\"settings\"", "\"set\""),
        &["line 1", "`settings`"],
    );
    assert_broken("speed.json", |text| text[..text.len() / 2].to_owned(), &["line", "EOF"]);
    assert_broken(
        "speed.json",
        |text| text.replace("\"tokens\": 32768", "\"tokens\": \"x\""),
        &["line", "\"x\""],
    );
    assert_broken(
        "speed.json",
        |text| text.replace("\"ttft_s\": 0.203", "\"ttft_s\": -0.203"),
        &["measured[0]", "ttft_s is -0.203"],
    );
    assert_broken(
        "speed.json",
        |text| text.replace("\"gather\": 0.0", "\"gather\": -1.0"),
        &["measured[0]", "stages_s.gather is -1"],
    );
    assert_broken("speed.json", |text| format!("{text}{text}"), &["there is more"]);
    assert_broken("kept.json", |text| text.replace("38, 39]", "38, 40]"), &["position 40", "40 tokens"]);
    assert_broken("kept.json", |text| text.replace("\"rows\": [40, ", "\"rows\": ["), &["kept has 3 layers"]);
}

#[test]
fn a_line_that_was_cut_off_is_left_out() {
    let scratch = Scratch::new();
    let text = fs::read_to_string(fixtures().join("answers.jsonl")).expect("UTF-8");
    scratch.file("answers.jsonl", &text[..text.len() - 30]);
    let html = draw(scratch.path("answers.jsonl").parent().expect("a directory")).html;
    assert!(html.contains("The last line was cut off"));
    let count = |html: &str| table(html, "Mean scores").iter().map(|row| number(&row[4])).sum::<f64>();
    assert_eq!(count(&html), answers().len() as f64 - 1.0);
}

#[test]
fn a_directory_without_results_is_refused() {
    let scratch = Scratch::new();
    let file = scratch.file("other.json", "{\"a\": 1}");
    let directory = file.parent().expect("a directory").to_str().expect("UTF-8").to_owned();
    let out = scratch.path("report.html");
    let out = out.to_str().expect("UTF-8");
    refused(["report", &directory, "--out", out], 1, &["has no results", "other files there: 1"]);
    refused(["report", &format!("{directory}/nothing"), "--out", out], 1, &["nothing", "cannot be read"]);
    refused(["report", &directory, "--out", "report.txt"], 2, &["report.txt", ".html"]);
    assert_eq!(scratch.names(), ["other.json"]);
    // Kinds to come are passed over, and so is what is no file.
    scratch.file("later.json", "{\"fastkv\": \"poem\"}");
    fs::create_dir(scratch.path("folder.json")).expect("writable");
    fs::copy(fixtures().join("kept.json"), scratch.path("kept.json")).expect("writable");
    #[cfg(unix)]
    std::os::unix::fs::symlink("nowhere", scratch.path("gone.json")).expect("writable");
    let report = json_of(["report", &directory, "--out", out, "--json"]);
    assert_eq!(report["read"], 1);
    let ignored = report["ignored"].as_array().expect("files");
    let files: Vec<&Value> = ignored.iter().map(|file| &file["file"]).collect();
    let expected = ["gone.json", "later.json", "other.json"];
    assert_eq!(files, expected[usize::from(!cfg!(unix))..]);
    let why = ignored[0].to_string();
    assert!(!cfg!(unix) || why.contains("leads nowhere"), "{why}");
}
