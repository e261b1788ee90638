//! Several prompts at once, held to what each gets alone.

use serde_json::{Value, json};

use super::support::{Scratch, fixture, json_of, needle, prompt_of, refused, run, stderr};

fn lines(values: &[Value]) -> String {
    values.iter().map(|value| format!("{value}\n")).collect()
}

#[test]
fn prompts_get_the_answers_they_get_alone() {
    let scratch = Scratch::new();
    let model = fixture("bf16-gqa4");
    let ids = prompt_of("bf16-gqa4")["ids"].as_array().expect("tokens").clone();
    let prompts = [(&ids[..], 8), (&ids[..40], 3), (&ids[..7], 0), (&ids[20..90], 12)];
    for policy in ["full", "snapkv", "h2o", "fastkv"] {
        let options = ["--policy", policy, "--json", "--max-tokens", "8"];
        let all: Vec<_> =
            prompts.iter().map(|(ids, most)| json!({ "tokens": ids, "max_tokens": most })).collect();
        let file = scratch.file("prompts.jsonl", lines(&all));
        let mut arguments =
            vec!["batch".into(), file.into_os_string(), "--model".into(), model.clone().into()];
        arguments.extend(options.iter().map(Into::into));
        let report = json_of(arguments);
        let answers = report["answers"].as_array().expect("answers");
        assert_eq!(answers.len(), prompts.len());
        assert!(report["ttft_s"].as_f64().expect("a time") > 0.0);
        assert!(report["decode_tokens_per_s"].as_f64().expect("a rate") > 0.0);
        for (answer, (ids, most)) in answers.iter().zip(prompts) {
            let tokens = scratch.file("tokens.json", json!(ids).to_string());
            let most = most.to_string();
            let mut arguments = vec!["generate".into(), "--tokens".into(), tokens.into_os_string()];
            arguments.extend(["--model".into(), model.clone().into()]);
            arguments.extend(options[..3].iter().map(Into::into));
            arguments.extend(["--max-tokens".into(), most.into()]);
            let alone = json_of(arguments);
            for field in
                ["tokens", "finish", "prompt_tokens", "kv_full_bytes", "kv_kept_bytes", "kv_peak_bytes"]
            {
                assert_eq!(answer[field], alone[field], "{policy}, {field} of {} tokens", ids.len());
            }
        }
    }
}

#[test]
fn texts_are_answered_in_their_order() {
    let scratch = Scratch::new();
    let model = needle();
    let model = model.to_str().expect("UTF-8");
    let prompts: Vec<Value> = ["1", "2", "3"]
        .map(|seed| json_of(["prompt", "--model", model, "--tokens", "300", "--seed", seed, "--json"]))
        .into();
    let part = |prompt: &Value, part: &str| prompt[part].as_str().expect("a text").to_owned();
    let text = |prompt: &Value| format!("{} {}", part(prompt, "context"), part(prompt, "question"));
    let answer = |prompt: &Value| part(prompt, "answer");
    // One has its question apart.
    let file = scratch.file(
        "prompts.jsonl",
        lines(&[
            json!({ "prompt": text(&prompts[0]) }),
            json!({ "prompt": prompts[1]["context"], "question": prompts[1]["question"] }),
            json!({ "prompt": text(&prompts[2]) }),
        ]),
    );
    let file = file.to_str().expect("UTF-8");
    let options = ["--model", model, "--policy", "full", "--max-tokens", "8"];
    let output = run(["batch", file].iter().chain(&options));
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    let expected: Vec<String> = prompts.iter().map(answer).collect();
    let expected = format!("[1] {}\n[2] {}\n[3] {}\n", expected[0], expected[1], expected[2]);
    assert_eq!(shown, expected, "{}", stderr(&output));
    assert!(stderr(&output).contains("3 prompts of "));
    let one = scratch.file("one.jsonl", lines(&[json!({ "tokens": [1], "max_tokens": 1 })]));
    let output = run(["batch", one.to_str().expect("UTF-8")].iter().chain(&options));
    assert!(stderr(&output).contains("1 prompt of 1 token read, 1 token written"), "{}", stderr(&output));
    // What ends an answer is asked of all, and comes in one.
    let second = answer(&prompts[1]);
    let (begin, _) = second.rsplit_once(' ').expect("words");
    let report = json_of(["batch", file, "--json", "--stop", begin].iter().chain(&options));
    assert_eq!(
        (&report["answers"][1]["finish"], &report["answers"][1]["text"]),
        (&json!("stop"), &json!(""))
    );
}

#[test]
fn lines_that_make_no_sense_are_named() {
    let scratch = Scratch::new();
    let model = fixture("bf16-gqa4");
    let model = model.to_str().expect("UTF-8");
    for (text, parts) in [
        ("", &["no prompts"][..]),
        ("{\"tokens\": [1]}\nnonsense\n", &["line 2: expected ident (column 2)\n"]),
        ("{\"tokens\": [1], \"color\": 3}\n", &["line 1", "color"]),
        ("{\"max_tokens\": 3}\n", &["line 1", "\"prompt\" or \"tokens\""]),
        ("\n{\"tokens\": []}\n", &["line 2", "no tokens"]),
        ("3\n", &["line 1", "expected an object such as {\"prompt\": \"text\"}"]),
        ("{\"tokens\": [1], \"question\": \" \"}\n", &["line 1", "\"question\" is empty"]),
        ("{\"tokens\": [1, 99999]}\n", &["line 1", "99999"]),
        ("{\"prompt\": \"text\"}\n", &["tokenizer.json"]),
    ] {
        let file = scratch.file("prompts.jsonl", text);
        refused(["batch", file.to_str().expect("UTF-8"), "--model", model], 1, parts);
    }
    refused(["batch", "/nowhere.jsonl", "--model", model], 1, &["/nowhere.jsonl"]);
    let file = scratch.file("prompts.jsonl", lines(&[json!({ "tokens": [1, 2] }), json!({ "tokens": [3] })]));
    let file = file.to_str().expect("UTF-8");
    refused(["batch", file, "--model", model, "--memory-limit", "100KiB"], 1, &["too large for memory"]);
}
