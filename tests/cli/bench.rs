//! `fastkv bench`: what it measures is there, and is what the library says; times are not held to anything.

use serde_json::{Value, json};

use fastkv::measure::{parameters, shape};

use super::support::{Scratch, assert_well_formed, fixture, floats, json_of, read_json, refused, stdout_of};

const TINY: [&str; 5] = ["bench", "--shape", "tiny", "--device", "cpu"];

fn bench(options: &[&str]) -> Value {
    json_of(TINY.iter().chain(options).chain(&["--json"]))
}

fn rows(report: &Value) -> &[Value] {
    report["measured"].as_array().expect("rows")
}

#[test]
fn every_policy_is_measured_at_every_length() {
    let scratch = Scratch::new();
    let [out, picture] = ["speed.json", "speed.svg"].map(|name| scratch.path(name));
    let paths = ["--out", out.to_str().expect("UTF-8"), "--picture", picture.to_str().expect("UTF-8")];
    let options = ["--tokens", "96,160", "--batch", "2", "--repeat", "3", "--decode", "5", "--policies"];
    let options = [&options[..], &["full,fastkv,gemfilter"], &paths].concat();
    let report = bench(&options);
    assert_eq!(read_json(&out), report);
    assert_eq!((&report["fastkv"], &report["shape"]), (&json!("bench"), &json!("tiny")));
    let config = shape("tiny").expect("a shape");
    assert_eq!(report["weights_bytes"], 4 * parameters(&config));
    let found: Vec<(u64, &str)> = rows(&report)
        .iter()
        .map(|row| (row["tokens"].as_u64().expect("a number"), row["policy"].as_str().expect("a name")))
        .collect();
    let expected = [96, 160].map(|tokens| ["full", "fastkv", "gemfilter"].map(|policy| (tokens, policy)));
    assert_eq!(found, expected.concat());
    for row in rows(&report) {
        let mut runs = floats(&row["ttft_runs_s"]);
        assert_eq!(runs.len(), 3);
        runs.sort_by(f64::total_cmp);
        assert_eq!(row["ttft_s"], runs[1]);
        let mut rates = floats(&row["decode_runs_tokens_per_s"]);
        assert_eq!(rates.len(), 3);
        rates.sort_by(f64::total_cmp);
        assert_eq!(row["decode_tokens_per_s"], rates[1]);
        assert!(runs[0] > 0.0 && rates[0] > 0.0);
        let full =
            rows(&report).iter().find(|other| other["tokens"] == row["tokens"]).expect("full comes first");
        let ratio = full["ttft_s"].as_f64().expect("a time") / runs[1];
        assert!((row["ttft_speedup"].as_f64().expect("a ratio") / ratio - 1.0).abs() < 1e-12);
        let stages = row["stages_s"].as_object().expect("stages");
        let of_stages: f64 = stages.values().map(|seconds| seconds.as_f64().expect("a time")).sum();
        assert!(stages.len() == 6 && of_stages > 0.0, "{stages:?}");
        let selects = stages["selection"].as_f64().expect("a time") > 0.0;
        assert_eq!(selects, row["policy"] != "full", "{stages:?}");
        // 4 layers, K and V of 2 heads of 64 elements of 4 bytes, two prompts.
        let tokens = row["tokens"].as_u64().expect("a number");
        assert_eq!(row["kv_full_bytes"], 2 * tokens * 4 * 2 * 2 * 64 * 4);
        assert_eq!(row["memory_peak_bytes"], Value::Null);
        let bound = row["flop_bound"].as_f64().expect("a ratio");
        let kept = row["kv_kept_bytes"].as_u64().expect("bytes");
        match row["policy"].as_str() {
            Some("full") => assert!(bound == 1.0 && row["kv_kept_bytes"] == row["kv_full_bytes"]),
            _ => assert!(bound > 1.0 && kept < row["kv_full_bytes"].as_u64().expect("bytes") / 4),
        }
    }
    // What was measured stays, unless it is said that it need not.
    let again = |more: &[&'static str]| {
        TINY.into_iter().chain(["--tokens", "32", "--repeat", "1"]).chain(more.to_vec())
    };
    for (option, path) in [("--out", paths[1]), ("--picture", paths[3])] {
        refused(again(&[]).chain([option, path]), 2, &[option, path, "there already", "--force"]);
    }
    assert_eq!(read_json(&out), report);
    let svg = std::fs::read_to_string(&picture).expect("a picture");
    assert_well_formed(&svg);
    assert!(svg.contains("Time to first token, s") && svg.contains("tiny, random weights"));

    // And a report reads it.
    let page = scratch.path("report.html");
    let directory = scratch.path("");
    let arguments = ["report", directory.to_str().expect("UTF-8"), "--out", page.to_str().expect("UTF-8")];
    assert!(stdout_of(arguments).contains("1 file of results"));
    stdout_of(again(&["--force"]).chain(paths));
    assert_eq!(read_json(&out)["measured"][0]["tokens"], 32);
}

#[test]
fn models_are_measured_as_well_and_shown_as_a_table() {
    let model = fixture("bf16-gqa4");
    let model = model.to_str().expect("UTF-8");
    let options = ["--tokens", "64", "--policies", "full,snapkv", "--repeat", "1", "--warm-up", "0"];
    let text = stdout_of(["bench", "--model", model, "--device", "cpu"].iter().chain(&options));
    for part in
        ["bf16-gqa4", "TTFT", "snapkv", "speed-up", "bound", "tok/s", "KV peak", "by stage", "products"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Where no length of its own choice fits, the longest is measured that does.
#[test]
fn short_contexts_are_measured_whole() {
    let model = fixture("bf16-gqa4");
    let model = ["bench", "--device", "cpu", "--model", model.to_str().expect("UTF-8"), "--policies", "full"];
    let options = ["--repeat", "1", "--warm-up", "0", "--json", "--decode"];
    let report = json_of(model.iter().chain(&options).chain(&["6"]));
    assert_eq!((rows(&report).len(), &rows(&report)[0]["tokens"]), (1, &json!(250)));
    for tokens in ["256", "18446744073709551615"] {
        let parts = ["--decode", tokens, "takes 256 tokens", "at most 255"];
        refused(model.iter().chain(&options).chain(&[tokens]), 2, &parts);
    }
}

/// Operations are those of the layer that was picked, not of the last candidate.
#[test]
fn operations_follow_the_layer_that_is_picked() {
    let flops = |tsp: &[&str]| {
        let options = ["--tokens", "200", "--repeat", "1", "--warm-up", "0", "--decode", "0", "--policies"];
        let report = bench(&[&options[..], &["fastkv"], tsp].concat());
        rows(&report)[0]["flops"].as_f64().expect("a number")
    };
    // Whatever the sets are, they agree enough.
    let picked = flops(&["--tsp-layer", "0-2", "--tsp-overlap", "0"]);
    assert_eq!(picked, flops(&["--tsp-layer", "1"]));
    assert!(picked < flops(&["--tsp-layer", "2"]));
}

#[test]
fn what_does_not_fit_is_told_and_skipped() {
    let config = shape("tiny").expect("a shape");
    let options = ["--repeat", "1", "--warm-up", "0", "--decode", "0", "--policies", "full"];
    // The model's context.
    let most = u64::MAX.to_string();
    let report = bench(&[&options[..], &["--tokens", "64,1000000", &most]].concat());
    assert_eq!((rows(&report).len(), &report["skipped"][1]["tokens"]), (1, &json!(u64::MAX)));
    assert_eq!(rows(&report)[0]["decode_tokens_per_s"], Value::Null);
    let reason = report["skipped"][0]["reason"].as_str().expect("a reason");
    assert!(reason.contains(&config.max_position_embeddings.to_string()), "{reason}");
    // Memory: room for a short prompt alone.
    let limit = (4 * parameters(&config) + (3 << 20)).to_string();
    let report = bench(&[&options[..], &["--tokens", "32,20000", "--memory-limit", &limit]].concat());
    assert_eq!((rows(&report).len(), &rows(&report)[0]["tokens"]), (1, &json!(32)));
    let reason = report["skipped"][0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("too large for memory"), "{reason}");
    // Nothing at all is a failure.
    let arguments = [&TINY[..], &options, &["--tokens", "64", "--memory-limit", "1MB"]].concat();
    let output = super::support::run(arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(super::support::stderr(&output).contains("nothing could be measured"));
}

#[test]
fn command_lines_that_make_no_sense_are_refused() {
    let cases: [(&[&str], &[&str]); 8] = [
        (&["--shape", "llama-9"], &["llama-9", "llama-3.1-8b"]),
        (&["--shape", "tiny", "--model", "x"], &["--model", "--shape"]),
        (&[], &["--model DIR", "--shape", "tiny"]),
        (&["--shape", "tiny", "--tokens", "64,64"], &["--tokens 64"]),
        (&["--shape", "tiny", "--policies", "full,full"], &["full twice"]),
        (&["--shape", "tiny", "--policies", "headkv"], &["--heads"]),
        (&["--shape", "tiny", "--picture", "x.png"], &["x.png", ".svg"]),
        (&["--shape", "tiny", "--picture", "x.svg", "--out", "x.svg"], &["x.svg", "two files"]),
    ];
    for (options, parts) in cases {
        refused(["bench"].iter().chain(options), 2, parts);
    }
}
