//! `fastkv profile heads` and `tsp` on models without a dialect.

use std::fs;
use std::path::Path;

use fastkv::eval::{Prose, Task};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::answers::{babbler, with_chat};
use super::support::{Scratch, json_of, read_json, refused, stdout_of};
use super::tiny::lookup;

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

/// `fastkv profile` with options of the model.
fn profile<'a>(model: &'a Path, options: &'a str) -> impl Iterator<Item = &'a str> {
    ["profile"].into_iter().chain(options.split(' ')).chain(["--model", text(model)])
}

#[test]
fn any_model_with_a_tokenizer_is_profiled() {
    let model = babbler();
    assert!(!model.path().join("dialect.json").exists());
    let tsp = |options: &str| {
        let options = format!("tsp --samples 1 --rates 0.5,1.0 --json {options}");
        let report = json_of(profile(model.path(), &options));
        let candidates = report["candidates"].as_array().expect("a list");
        assert_eq!((&report["samples"], candidates.len()), (&json!(1), 2 * 2), "{report}");
        for candidate in &candidates[2..] {
            assert_eq!((&candidate["same_answers"], &candidate["cost"]), (&json!(1), &json!(1.0)));
            assert_eq!(candidate["right_answers"], report["right_answers"]);
        }
        report
    };
    let plain = tsp("--tokens 1200");
    assert_eq!(plain, tsp("--tokens 1200 --task multikey_1 --prompt-seed 1"), "the defaults");
    for options in ["--tokens 1200 --task single_2", "--tokens 1200 --prompt-seed 2", "--tokens 1100"] {
        assert_ne!(plain, tsp(options), "{options}");
    }
    tsp("--tokens 1200 --task multivalue");
    let heads = "heads --samples 2 --tokens 1200";
    let nothing = ["none of 2 prompts was answered right", "easier --task"];
    refused(profile(model.path(), heads), 1, &nothing);
    with_chat(model.path());
    assert_ne!(plain, tsp("--tokens 1200"));
    assert_eq!(plain, tsp("--tokens 1200 --no-chat"));
    refused(profile(model.path(), heads), 1, &nothing);
    let table = stdout_of(profile(model.path(), "tsp --samples 1 --tokens 1200 --rates 1.0"));
    assert!(table.contains("1 of 1") && table.contains("the full context answers 0 of 1 right"), "{table}");
}

const SAMPLES: u64 = 6;

const HAY: &str = "Anna went home. Ben saw her there! Who was Clara?";

/// What stands around a prompt of a model that chats: tokens beside those of the prompt, in front of it too.
const CHAT: &str = "Please read , then answer . {{ messages[0].content }} Now :";

/// A model that looks up what stands behind two tokens, for prompts of depth_map in this haystack.
fn depth_map_model(haystack: &Path, stops: bool, chats: bool) -> TempDir {
    let prose = Prose::from_file(haystack).expect("prose");
    let task = Task::from_name("depth_map").expect("a task");
    // Lengths are measured with seed 0.
    let seeds = [0].into_iter().chain((0..SAMPLES).map(|sample| (1 << 32) + sample));
    let texts = seeds.map(|seed| task.question(&prose, 400, 3, seed, 0.5).expect("a question").text());
    let texts: Vec<String> = texts.chain(chats.then(|| CHAT.to_owned())).collect();
    let model = lookup::write_for(&texts);
    if chats {
        fs::write(model.path().join("chat_template.jinja"), CHAT).expect("writable");
    }
    if !stops {
        fs::remove_file(model.path().join("generation_config.json")).expect("there is one");
    }
    model
}

#[test]
fn heads_that_look_things_up_are_told_from_others() {
    let scratch = Scratch::new();
    let haystack = scratch.file("hay.txt", HAY);
    for (stops, chats, scoring) in [
        (true, false, "retrieval"),
        (true, true, "reasoning"),
        (false, true, "retrieval"),
        (false, false, "reasoning"),
    ] {
        let model = depth_map_model(&haystack, stops, chats);
        let file = scratch.path("heads.json");
        let options = format!(
            "heads --task depth_map --tokens 400 --samples {SAMPLES} --scoring {scoring} --haystack {} --force --out {}",
            text(&haystack),
            text(&file)
        );
        let table = stdout_of(profile(model.path(), &options));
        let right = table.split(' ').next().and_then(|number| number.parse::<usize>().ok()).expect("a count");
        assert!(right >= 4 && table.contains("1-0"), "{table}");
        for (head, scores) in read_json(&file).as_object().expect("scores") {
            let scores = scores.as_array().expect("a list");
            assert_eq!(scores.len(), right, "only right answers count");
            for score in scores {
                // Layer 1 looks at each digit of the number when it says it, and layer 0 nowhere near.
                let expected = if head.starts_with("1-") { 1.0 } else { 0.0 };
                let score = score.as_f64().expect("a number");
                assert!((score - expected).abs() < 0.01, "{scoring}, {head}: {score}");
            }
        }
    }
}

#[test]
fn tsp_layers_are_told_apart_by_right_answers() {
    let scratch = Scratch::new();
    let haystack = scratch.file("hay.txt", HAY);
    let options = format!(
        "tsp --task depth_map --tokens 400 --samples {SAMPLES} --haystack {} --json",
        text(&haystack)
    );
    let reports = [true, false].map(|stops| {
        let model = depth_map_model(&haystack, stops, false);
        json_of(profile(model.path(), &options))
    });
    for report in &reports {
        let right = report["right_answers"].as_u64().expect("a count");
        assert!(right >= 4, "{report}");
        for (candidate, twin) in zip(&reports[0]["candidates"], &reports[1]["candidates"]) {
            let count = |field: &str| candidate[field].as_u64().expect("a count");
            // The same answer is as right, and whether it is does not hang on what comes behind it.
            assert!(count("same_answers").abs_diff(count("right_answers")) <= SAMPLES - right, "{candidate}");
            assert_eq!(candidate["right_answers"], twin["right_answers"]);
        }
        assert_eq!(report["candidates"][0]["right_answers"], 0, "a tenth of the rows, chosen by layer 0");
        assert!(report["candidates"][4]["right_answers"].as_u64() > Some(0), "{report}");
    }
}

/// The elements of two JSON arrays, side by side.
fn zip<'a>(one: &'a Value, other: &'a Value) -> impl Iterator<Item = (&'a Value, &'a Value)> {
    one.as_array().expect("a list").iter().zip(other.as_array().expect("a list"))
}

#[test]
fn tasks_that_do_not_fit_are_refused() {
    let model = babbler();
    let model = model.path();
    let needles = "single_1, single_2, single_3, multikey_1, multikey_2, multikey_3, key_value, depth_map";
    for task in ["multivalue", "multiquery", "variable_tracking", "frequent_words", "passkey"] {
        let options = format!("heads --tokens 5 --task {task}");
        refused(profile(model, &options), 2, &[&format!("--task {task}"), "in one place", needles]);
    }
    for command in ["heads", "tsp"] {
        let parts = ["'multikye_1'", "did you mean multikey_1?", "single_1", "depth_map"];
        refused(profile(model, &format!("{command} --task multikye_1")), 2, &parts);
        let parts = ["multikey_1", "300 tokens", "no room"];
        refused(profile(model, &format!("{command} --tokens 300")), 1, &parts);
        let parts = ["--tokens 10001", "at most 10000", "max_position_embeddings"];
        refused(profile(model, &format!("{command} --tokens 10001")), 2, &parts);
        let parts = ["/nowhere/hay.txt"];
        refused(profile(model, &format!("{command} --haystack /nowhere/hay.txt")), 1, &parts);
    }
    let words = lookup::write();
    let parts = ["single_2", "no token for"];
    refused(profile(words.path(), "heads --task single_2"), 1, &parts);
    fs::remove_file(words.path().join("tokenizer.json")).expect("there is one");
    refused(profile(words.path(), "tsp --tokens 300"), 1, &["tokenizer.json"]);
}
