//! `fastkv eval`'s file of answers, tasks for any tokenizer, and the user's own; `fastkv profile selection`.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::{Scratch, json_of, needle, program, refused, run, stderr, stdout_of};
use super::tiny::{Tiny, lookup};

/// The path as an argument.
fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// A tiny random model that reads and writes bytes, and answers nonsense.
pub(crate) fn babbler() -> TempDir {
    let directory = Tiny { vocabulary: 350, layers: 2, context: 10_000, ..Tiny::default() }.write();
    let tokenizers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/byte-level");
    fs::copy(tokenizers.join("tokenizer.json"), directory.path().join("tokenizer.json"))
        .expect("a tokenizer");
    directory
}

/// Gives a model a chat template with roles in front.
pub(crate) fn with_chat(model: &Path) {
    let template = "{% for message in messages %}<|role|>{{ message.role }}\n{{ message.content | trim }}<|end|>\
                    {% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}";
    let config = json!({ "chat_template": template, "bos_token": "<|begin|>" });
    fs::write(model.join("tokenizer_config.json"), config.to_string()).expect("writable");
}

/// The header and the answers.
fn answers(file: &Path) -> (Value, Vec<Value>) {
    let text = fs::read_to_string(file).expect("readable");
    assert!(text.ends_with('\n'));
    let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    (lines.next().expect("a header"), lines.collect())
}

/// A file of answers without what varies from run to run.
fn timeless(file: &Path) -> Vec<Value> {
    let (header, mut answers) = answers(file);
    answers.iter_mut().for_each(|answer| answer["ttft_s"] = Value::Null);
    answers.insert(0, header);
    answers
}

#[test]
fn a_model_that_looks_up_answers_every_needle() {
    let (scratch, model) = (Scratch::new(), lookup::write());
    let out = scratch.path("answers.jsonl");
    let arguments =
        ["eval", "--tasks", "all", "--tokens", "300,1500", "--samples", "6", "--json", "--window", "4"];
    let policies = ["--policies", "full,snapkv,streamingllm", "--retention", "0.1"];
    let files = ["--model", text(model.path()), "--out", text(&out)];
    let report = json_of(arguments.into_iter().chain(policies).chain(files));
    for answer in answers(&out).1.iter().filter(|answer| answer["policy"] != "streamingllm") {
        assert_eq!(answer["prediction"], answer["references"][0], "{answer}");
    }
    let [full, _, streaming] = report["policies"].as_array().expect("policies").as_slice() else {
        panic!("{report}")
    };
    for row in full["tasks"].as_array().expect("tasks") {
        assert_eq!(
            (&row["samples"], &row["exact"], &row["score"]),
            (&json!(6), &json!(6), &json!(100.0)),
            "{row}"
        );
    }
    assert_eq!(full["tasks"].as_array().map(Vec::len), Some(6), "three tasks at two lengths");
    for row in streaming["tasks"].as_array().expect("tasks") {
        assert!(row["exact"].as_u64().expect("a count") <= 3, "{row}");
    }
}

#[test]
fn answers_have_their_figures() {
    let scratch = Scratch::new();
    let model = lookup::write();
    let out = scratch.path("answers.jsonl");
    let arguments = ["eval", "--tasks", "multikey,depth_map", "--tokens", "300,600", "--samples", "2"];
    let budgets =
        ["--depths", "0,0.5,1", "--policies", "full,snapkv,h2o", "--budgets", "0.5,20", "--window", "4"];
    let files = ["--model", text(model.path()), "--out", text(&out)];
    let table = stdout_of(arguments.into_iter().chain(budgets).chain(files));
    for part in
        ["scores at 300 tokens", "scores at 600 tokens", "snapkv 0.5", "snapkv 20", "depth_map (n = 6)"]
    {
        assert!(table.contains(part), "{part}: {table}");
    }
    let (header, answers) = answers(&out);
    assert_eq!((&header["fastkv"], &header["version"]), (&json!("eval"), &json!(env!("CARGO_PKG_VERSION"))));
    assert_eq!(
        (&header["model"], &header["settings"]["lengths"]),
        (&json!(text(model.path())), &json!([300, 600]))
    );
    assert!(header["device"].as_str().is_some_and(|device| device.starts_with("cpu")));
    // Two lengths; two and three times two questions; full once, the others at two budgets.
    assert_eq!(answers.len(), 2 * (2 + 3 * 2) * 5);
    for answer in &answers {
        let retention = &answer["retention"];
        let right = match answer["policy"].as_str().expect("a name") {
            "full" => retention.is_null() && answer["options"] == json!({ "name": "full" }),
            "snapkv" => {
                *retention == json!(0.5) && answer["options"]["retention"] == json!({ "rate": 0.5 })
                    || *retention == json!(20) && answer["options"]["retention"] == json!({ "tokens": 20 })
            }
            _ => *retention == json!(0.5) || *retention == json!(20),
        };
        assert!(right, "{answer}");
        let number = |field: &str| answer[field].as_f64().unwrap_or_else(|| panic!("{field} in {answer}"));
        assert!(
            number("prompt_tokens") <= number("tokens") && number("prompt_tokens") + 30.0 > number("tokens")
        );
        assert!(number("kv_kept_bytes") <= number("kv_full_bytes") && number("kv_peak_bytes") > 0.0);
        // Keys and values in f32, of 2 layers with 2 heads, 128 wide.
        assert_eq!(number("kv_full_bytes"), number("prompt_tokens") * (2 * 2 * 2 * 128 * 4) as f64);
        assert!(number("ttft_s") > 0.0);
        let is_right = answer["prediction"] == answer["references"][0];
        assert_eq!((answer["exact"] == true, answer["score"] == 100.0), (is_right, is_right), "{answer}");
        if answer["task"] == "depth_map" {
            let sample = answer["sample"].as_u64().expect("a number");
            assert_eq!(answer["depth"], [0.0, 0.5, 1.0][sample as usize / 2], "{answer}");
        } else {
            assert!((0.0..1.0).contains(&number("depth")));
        }
    }
}

/// A run of some seconds on the babbler.
fn long_run(model: &Path, out: &Path) -> Vec<String> {
    let arguments =
        "eval --tasks single_2,multikey_2,passkey --tokens 1500 --samples 8 --policies full,snapkv,random";
    let files = ["--model", text(model), "--out", text(out)];
    arguments.split(' ').chain(files).map(str::to_owned).collect()
}

/// Starts it, and waits for some answers.
fn started(arguments: &[String], out: &Path) -> Child {
    let child =
        program().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let lines = || fs::read_to_string(out).map_or(0, |text| text.lines().count());
    let start = Instant::now();
    while lines() < 6 && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_killed_run_goes_on_where_it_was() {
    let (scratch, model) = (Scratch::new(), babbler());
    let [whole, killed] = ["whole.jsonl", "killed.jsonl"].map(|name| scratch.path(name));
    stdout_of(long_run(model.path(), &whole));
    let mut child = started(&long_run(model.path(), &killed), &killed);
    child.kill().expect("a child");
    child.wait().expect("it ended");
    let before = fs::read(&killed).expect("readable");
    let cut = before.len() - 10;
    for bytes in [&before[..], &before[..cut]] {
        fs::write(&killed, bytes).expect("writable");
        let text = stdout_of(long_run(model.path(), &killed).into_iter().chain(["--resume".to_owned()]));
        assert_eq!(timeless(&killed), timeless(&whole));
        assert_eq!(
            text,
            stdout_of(long_run(model.path(), &whole).into_iter().chain(["--resume".to_owned()]))
        );
    }
    assert!(before.len() < fs::read(&whole).expect("readable").len(), "it was killed midway");
    // Answers that are there are not asked for again: their times stay.
    let kept = before.iter().filter(|byte| **byte == b'\n').count();
    let lines = |bytes: &[u8]| String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(lines(&fs::read(&killed).expect("readable"))[..kept - 1], lines(&before)[..kept - 1]);
    // A header that was cut off is written anew.
    fs::write(&killed, &before[..40]).expect("writable");
    stdout_of(long_run(model.path(), &killed).into_iter().chain(["--resume".to_owned()]));
    assert_eq!(timeless(&killed), timeless(&whole));
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_was_answered() {
    let (scratch, model) = (Scratch::new(), babbler());
    let out = scratch.path("answers.jsonl");
    let arguments: Vec<String> =
        long_run(model.path(), &out).into_iter().chain(["--json".to_owned()]).collect();
    let child = started(&arguments, &out);
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("there is a kill").success());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["cancelled"], true);
    let rows = report["policies"].as_array().expect("policies").iter();
    let counted: u64 = rows
        .flat_map(|row| row["tasks"].as_array().expect("tasks"))
        .map(|task| task["samples"].as_u64().expect("a count"))
        .sum();
    let answered = answers(&out).1.len() as u64;
    assert!((5..72).contains(&answered) && counted == answered, "{answered}, {counted}");
}

#[test]
fn files_of_other_settings_are_left_alone() {
    let (scratch, model) = (Scratch::new(), lookup::write());
    let out = scratch.path("answers.jsonl");
    let eval = |options: &str| {
        let options: Vec<String> = options.split(' ').map(str::to_owned).collect();
        ["eval", "--model", text(model.path()), "--out", text(&out)]
            .map(str::to_owned)
            .into_iter()
            .chain(options)
    };
    let options = "--tasks single --tokens 100 --samples 2 --policies snapkv --window 4";
    stdout_of(eval(options));
    let before = fs::read(&out).expect("readable");
    let unchanged = || assert_eq!(fs::read(&out).expect("readable"), before);
    refused(eval(options), 2, &["answers.jsonl", "--resume"]);
    unchanged();
    for (change, parts) in [
        (
            "--tasks single,hard --tokens 100 --samples 2 --policies snapkv --window 4",
            &["tasks", "\"hard\" here"][..],
        ),
        (
            "--tasks single --tokens 120 --samples 2 --policies snapkv --window 4",
            &["lengths: 100 there, 120 here"],
        ),
        (
            "--tasks single --tokens 100 --samples 3 --policies snapkv --window 4",
            &["samples: 2 there, 3 here"],
        ),
        (
            "--tasks single --tokens 100 --samples 2 --policies snapkv --window 5",
            &["policies", "\"window\":4", "\"window\":5"],
        ),
        (
            "--tasks single --tokens 100 --samples 2 --policies snapkv --window 4 --prompt-seed 9",
            &["prompt_seed: 0 there, 9 here"],
        ),
        (
            "--tasks single --tokens 100 --samples 2 --policies snapkv --window 4 --query-agnostic",
            &["query_agnostic"],
        ),
        (
            "--tasks single --tokens 100 --samples 2 --policies snapkv --window 4 --threads 1 --device cpu",
            &[][..],
        ),
    ] {
        let arguments: Vec<String> = eval(change).chain(["--resume".to_owned()]).collect();
        if parts.is_empty() {
            // One thread is another device where there are more.
            run(arguments);
        } else {
            refused(arguments, 2, &[parts, &["of other settings"]].concat());
        }
        unchanged();
    }
    // Another model of the same shape.
    let norm = fs::read(model.path().join("model.safetensors")).expect("readable");
    let mut other = norm.clone();
    let length = other.len();
    other.iter_mut().skip(length / 2).for_each(|byte| *byte ^= u8::from(*byte == 0x3f));
    fs::write(model.path().join("model.safetensors"), other).expect("writable");
    refused(eval(options).chain(["--resume".to_owned()]), 2, &["model:"]);
    fs::write(model.path().join("model.safetensors"), norm).expect("writable");
    unchanged();
    // Files that are something else.
    let resumed = |contents: &str, parts: &[&str]| {
        fs::write(&out, contents).expect("writable");
        refused(eval(options).chain(["--resume".to_owned()]), 1, parts);
        assert_eq!(fs::read_to_string(&out).expect("readable"), contents);
    };
    resumed("{\"a\": 1}\n", &["no file of answers"]);
    resumed("my notes, without a line break", &["no file of answers"]);
    let text = String::from_utf8(before.clone()).expect("UTF-8");
    let header = text.lines().next().expect("a header");
    let answer = text.lines().nth(1).expect("an answer");
    resumed(&format!("{header}\nnonsense\n{answer}\n"), &["line 2: no answer: expected ident (column 2)\n"]);
    resumed(&format!("{header}\n{answer}\n{answer}\n"), &["line 3", "answered before"]);
    resumed(
        &format!("{header}\n{}\n", answer.replace("\"sample\":0", "\"sample\":7")),
        &["line 2", "no question"],
    );
    fs::write(&out, &before).expect("writable");
    refused(["eval", "--model", text_of(&model), "--resume"], 2, &["--out"]);
}

fn text_of(model: &TempDir) -> &str {
    text(model.path())
}

#[test]
fn every_task_reaches_any_model() {
    let (scratch, model) = (Scratch::new(), babbler());
    for (index, setting) in [None, Some("--query-agnostic"), Some("--no-chat")].into_iter().enumerate() {
        // From the second round on there is a chat template.
        if index == 1 {
            with_chat(model.path());
        }
        // A list with common words is long where a token is a letter.
        for (tasks, tokens) in [(OTHERS, 2500), ("common_words", 9000)] {
            let out = scratch.path(&format!("{index} {tokens}.jsonl"));
            let length = tokens.to_string();
            let arguments =
                ["eval", "--tasks", tasks, "--tokens", &length, "--samples", "1", "--depths", "0.5"];
            let files = ["--policies", "streamingllm", "--model", text(model.path()), "--out", text(&out)];
            stdout_of(arguments.into_iter().chain(setting).chain(files));
            let (header, answers) = answers(&out);
            assert_eq!(header["settings"]["chat"], index == 1);
            let names: Vec<&str> =
                answers.iter().map(|answer| answer["task"].as_str().expect("a name")).collect();
            assert_eq!(names.join(","), tasks);
            for answer in &answers {
                let prompt = answer["prompt_tokens"].as_u64().expect("a number");
                assert!(prompt < tokens && prompt + tokens / 8 > tokens, "{answer}");
                assert!(answer["score"].as_f64().is_some_and(|score| (0.0..=100.0).contains(&score)));
            }
        }
    }
}

/// Every task but common_words.
const OTHERS: &str = "single_1,single_2,single_3,multikey_1,multikey_2,multikey_3,multivalue,multiquery,\
                      variable_tracking,frequent_words,passkey,key_value,depth_map";

#[test]
fn own_questions_are_asked_and_cut_in_the_middle() {
    let (scratch, model) = (Scratch::new(), lookup::write());
    let filler = "anna went home . ".repeat(40);
    let asked = |context: &str| json!({ "context": context, "question": "question : the number of calm bear", "answers": ["11 12 13"], "scoring": "whole" });
    let needle = "the number of calm bear 11 12 13 .";
    let lines = [
        asked(&format!("{needle} {filler}")),
        asked(&format!("{filler} {needle} {filler}")),
        asked(&format!("{filler} {needle}")),
    ];
    let file = scratch.file("mine.jsonl", lines.map(|line| line.to_string()).join("\n"));
    let out = scratch.path("out.jsonl");
    let arguments =
        ["eval", "--policies", "full", "--tokens", "1000,300", "--json", "--task-file", text(&file)];
    let files = ["--model", text(model.path()), "--out", text(&out)];
    let report = json_of(arguments.into_iter().chain(files));
    let tasks = &report["policies"][0]["tasks"];
    assert_eq!(tasks[0], json!({ "task": "mine", "tokens": 1000, "samples": 3, "exact": 3, "score": 100.0 }));
    // Cut, the middle is gone.
    assert_eq!((&tasks[1]["tokens"], &tasks[1]["exact"]), (&json!(300), &json!(2)), "{tasks}");
    let (_, answers) = answers(&out);
    let wrong: Vec<&Value> = answers.iter().filter(|answer| answer["exact"] == false).collect();
    assert_eq!((wrong.len(), &wrong[0]["sample"], &wrong[0]["tokens"]), (1, &json!(1), &json!(300)));
    assert!(answers.iter().all(|answer| answer["prompt_tokens"].as_u64() <= answer["tokens"].as_u64()));

    let eval = |options: &[&str]| {
        ["eval", "--model", text_of(&model), "--task-file", text(&file)]
            .into_iter()
            .chain(options.iter().copied())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    refused(eval(&["--tokens", "100"]), 1, &["line 1 of mine", "100 tokens", "no room"]);
    let file = scratch.file("mine.jsonl", "{\"question\": \"who is unheard of ?\", \"answers\": []}");
    refused(
        ["eval", "--model", text_of(&model), "--task-file", text(&file)],
        1,
        &["mine.jsonl, line 1", "`answers`"],
    );
    let file = scratch.file("mine.jsonl", "nonsense");
    refused(
        ["eval", "--model", text_of(&model), "--task-file", text(&file)],
        1,
        &["mine.jsonl, line 1: no JSON: expected ident (column 2)\n"],
    );
    let file = scratch.file("mine.jsonl", "{\"question\": \"who is unheard\", \"answers\": [\"anna\"]}");
    refused(
        ["eval", "--model", text_of(&model), "--task-file", text(&file)],
        1,
        &["line 1 of mine", "\"who\""],
    );
}

#[test]
fn options_out_of_range_are_named() {
    let (scratch, model) = (Scratch::new(), lookup::write());
    let eval = |options: &'static str| {
        let model = text(model.path()).to_owned();
        ["eval".to_owned(), "--model".to_owned(), model]
            .into_iter()
            .chain(options.split(' ').map(str::to_owned))
    };
    refused(eval("--tasks single --tokens 5000"), 2, &["--tokens 5000", "4096", "max_position_embeddings"]);
    refused(eval("--tasks single --tokens 0"), 2, &["--tokens 0"]);
    refused(eval("--tasks single --tokens 300,300"), 2, &["--tokens 300", "twice"]);
    refused(eval("--tasks single,single"), 2, &["single", "twice"]);
    refused(eval("--tasks depth_map --depths 0.5,1.5"), 2, &["--depths 1.5", "0 to 1"]);
    refused(eval("--policies snapkv --budgets 0.5,1.5"), 2, &["1.5", "above 0 and at most 1"]);
    refused(eval("--policies snapkv --budgets 3"), 2, &["retention is 3 tokens"]);
    refused(eval("--policies snapkv --budgets 0.5 --retention 0.1"), 2, &["--budgets", "--retention"]);
    refused(eval("--policies full --budgets 0.5"), 2, &["--retention is not an option here"]);
    refused(eval("--policies snapvk"), 2, &["did you mean snapkv?"]);
    refused(eval("--tasks key_value"), 1, &["key_value", "no token for \"Below\""]);
    refused(eval("--haystack /nowhere/text.txt"), 1, &["/nowhere/text.txt"]);
    refused(eval("--out /nowhere/out.jsonl"), 1, &["/nowhere/out.jsonl"]);
    let babbler = babbler();
    let model = text(babbler.path());
    refused(
        ["eval", "--model", model, "--tasks", "common_words", "--tokens", "700"],
        1,
        &["common_words", "700 tokens", "no room"],
    );
    refused(
        ["eval", "--model", model, "--tasks", "multikey", "--tokens", "700"],
        2,
        &["'multikey'", "did you mean multikey_1?"],
    );
    let out = scratch.path("out.jsonl");
    refused(
        ["eval", "--model", model, "--tasks", "common_words", "--tokens", "700", "--out", text(&out)],
        1,
        &["no room"],
    );
    assert!(!out.exists(), "nothing is begun");
}

#[test]
fn selection_is_measured_without_a_model() {
    let short = ["profile", "selection", "--tokens", "300", "--samples", "2", "--planted", "8"];
    let report = json_of(short.into_iter().chain(["--raise", "9", "--budgets", "0.5,16,1.0", "--json"]));
    let recall = report["recall"].as_array().expect("a list");
    let found = |pooling: &str, tokens: u64| {
        let row = recall.iter().find(|row| row["pooling"] == pooling && row["tokens"] == tokens);
        row.unwrap_or_else(|| panic!("{pooling} {tokens}: {recall:?}"))["mean"].as_f64().expect("a share")
    };
    assert_eq!((recall.len(), found("max pooling 1", 16), found("max pooling 1", 300)), (9, 1.0, 1.0));
    assert!(found("max pooling 7", 16) < 0.6, "neighbours take the room");
    let output = report["output"].as_array().expect("a list");
    assert_eq!(
        output.iter().map(|row| row["tokens"].as_u64()).collect::<Vec<_>>(),
        [Some(16), Some(150), Some(300)]
    );
    assert!(output.iter().all(|row| row["bounded"] == true && row["of_bound"].as_f64() <= Some(1.0)));
    assert!(output[0]["relative_error"].as_f64() > output[1]["relative_error"].as_f64());
    assert!(output[2]["relative_error"].as_f64() < Some(1e-4));
    let table = stdout_of(short);
    assert!(table.contains("found, max pooling 7") && table.contains("of its bound"), "{table}");
    refused(short.into_iter().chain(["--budgets", "8"]), 2, &["--budgets 8", "9 to 300"]);
    refused(short.into_iter().chain(["--budgets", "1.5"]), 2, &["--budgets 1.5"]);
    refused(short.into_iter().chain(["--kernel", "4"]), 2, &["--kernel 4", "odd"]);
    refused(short.into_iter().chain(["--window", "99"]), 2, &["--window 99"]);
    refused(["profile", "selection", "--tokens", "8"], 2, &["--tokens 8"]);
    refused(["profile", "selection", "--planted", "5000"], 2, &["--planted 5000"]);
}

/// The model's context ends an answer before memory does.
#[test]
fn answers_may_be_as_long_as_they_come() {
    let [model, most] = [needle().display().to_string(), u64::MAX.to_string()];
    let base = ["--question", "for", "--max-tokens", &most, "--model", &model, "--json", "the magic number"];
    let answer = json_of(["generate", "--policy", "full"].into_iter().chain(base));
    assert_eq!(answer["finish"], "stop");
    let report = json_of(["compare", "--policies", "full"].into_iter().chain(base));
    assert_eq!(report["policies"][0]["tokens"], answer["tokens"]);
}
