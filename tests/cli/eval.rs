//! `fastkv prompt` and `fastkv eval`: prompts whose answers are known, and who finds them.

use std::collections::HashSet;

use serde_json::Value;

use crate::support::{Scratch, fixture, json_of, needle, read_json, refused, stdout_of};

fn prompt(tokens: usize, facts: usize, seed: usize) -> Value {
    let [tokens, facts, seed] = [tokens, facts, seed].map(|number| number.to_string());
    let model = needle();
    let model = model.to_str().expect("a plain path");
    json_of(["prompt", "--model", model, "--tokens", &tokens, "--facts", &facts, "--seed", &seed, "--json"])
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} in {value}"))
}

#[test]
fn facts_stand_where_the_prompt_says() {
    for (tokens, count, seed) in [(80, 1, 0), (400, 8, 1), (3000, 24, 2)] {
        let prompt = prompt(tokens, count, seed);
        let words: Vec<&str> = text(&prompt, "context").split(' ').collect();
        let facts = prompt["facts"].as_array().expect("facts");
        assert_eq!(facts.len(), count);
        let mut keys = HashSet::new();
        for fact in facts {
            let (key, value) = (text(fact, "key"), text(fact, "value"));
            let sentence = format!("the magic number for {key} is {value} .");
            let first = fact["word"].as_u64().expect("a number") as usize;
            let length = sentence.split(' ').count();
            assert_eq!(words[first..first + length].join(" "), sentence);
            assert!(keys.insert(key), "{key} twice");
            let numbers: HashSet<&str> = value.split(' ').collect();
            assert_eq!(numbers.len(), 3, "three different numbers: {value}");
        }
        let question = text(&prompt, "question");
        let asked = facts.iter().find(|fact| question.ends_with(&format!("for {} is", text(fact, "key"))));
        assert_eq!(text(asked.expect("a fact is asked for"), "value"), text(&prompt, "answer"));
        let all = words.len() + question.split(' ').count() + 1;
        assert!(all <= tokens && all + 20 > tokens, "{all} of {tokens} tokens");
    }
}

#[test]
fn a_seed_makes_a_prompt() {
    assert_eq!(prompt(500, 4, 7), prompt(500, 4, 7));
    assert_ne!(prompt(500, 4, 7)["context"], prompt(500, 4, 8)["context"]);
    let json = prompt(500, 4, 7);
    let arguments = ["prompt", "--tokens", "500", "--facts", "4", "--seed", "7", "--model"].map(String::from);
    let model = needle().to_str().expect("a plain path").to_owned();
    let plain = stdout_of(arguments.into_iter().chain([model]));
    assert_eq!(plain, format!("{} {}\n", text(&json, "context"), text(&json, "question")));
}

#[test]
fn prompts_that_cannot_be_are_refused() {
    let model = needle();
    let model = model.to_str().expect("a plain path");
    refused(["prompt", "--model", model, "--tokens", "97"], 1, &["97 tokens", "8 facts", "98 are the least"]);
    stdout_of(["prompt", "--model", model, "--tokens", "98"]);
    for tokens in ["0", "18446744073709551615"] {
        refused(["prompt", "--model", model, "--tokens", tokens], 2, &[tokens, "1..=16777216"]);
    }
    refused(["prompt", "--model", model, "--facts", "5000"], 1, &["5000 facts", "2304"]);
    refused(["prompt", "--model", model, "--facts", "0"], 1, &["0 facts", "at least 1"]);
    let other = fixture("bf16-gqa4");
    let other = other.to_str().expect("a plain path");
    refused(["prompt", "--model", other], 1, &["dialect.json"]);
    let parts = ["'multikye'", "did you mean multikey?", "hard, multikey, single, single_1"];
    refused(["eval", "--model", model, "--tasks", "single,multikye"], 2, &parts);
    refused(["eval", "--model", model, "--samples", "0"], 2, &["--samples"]);
    let parts = ["5 tokens", "1 fact and", "29 are the least"];
    refused(["eval", "--model", model, "--tokens", "5", "--policies", "full"], 1, &parts);
    let parts = ["5 tokens", "8 facts", "106 are the least"];
    refused(["profile", "heads", "--model", model, "--tokens", "5"], 1, &parts);
    let most = u64::MAX.to_string();
    refused(["profile", "tsp", "--model", model, "--tokens", &most], 2, &[&most, "at most 8192"]);
}

/// Exact answers of each policy to a dozen prompts of a thousand tokens.
fn exact(options: &[&str]) -> Vec<u64> {
    let model = needle();
    let fixed = ["--tasks", "multikey", "--tokens", "1024", "--samples", "12", "--json", "--model"];
    let arguments = ["eval"].into_iter().chain(fixed).chain([model.to_str().expect("a plain path")]);
    let report = json_of(arguments.chain(options.iter().copied()));
    assert_eq!(report["cancelled"], false);
    let rows = report["policies"].as_array().expect("policies");
    let score = |row: &Value| {
        assert_eq!(row["tasks"][0]["samples"], 12);
        row["tasks"][0]["exact"].as_u64().expect("a count")
    };
    rows.iter().map(score).collect()
}

#[test]
fn the_shipped_model_tells_policies_apart() {
    let policies = ["--policies", "full,fastkv,snapkv,streamingllm,random"];
    let budgets = ["--retention", "0.0625", "--propagation", "0.25", "--window", "8"];
    let scores =
        exact(&[policies, ["--tsp-layer", "2"]].concat().into_iter().chain(budgets).collect::<Vec<_>>());
    let [full, fastkv, snapkv, streaming, random] = scores[..] else { panic!("{scores:?}") };
    assert!(full >= 11 && fastkv >= 10 && snapkv >= 10, "those that keep what matters answer: {scores:?}");
    assert!(streaming <= 3 && random <= 3, "those that do not fail: {scores:?}");
}

#[test]
fn every_policy_answers_or_fails_as_it_should() {
    let budgets = ["--retention", "0.125", "--propagation", "0.25", "--window", "8", "--samples", "5"];
    let policies = "pyramidkv,adakv,h2o,fastgen,pyramidinfer,fastkv+adakv,fastkv+h2o";
    let model = needle();
    let fixed = ["eval", "--suite", "quick", "--tasks", "multikey", "--json", "--model"];
    let fixed = fixed.into_iter().chain([model.to_str().expect("a plain path"), "--policy", policies]);
    let options = ["--tsp-layer", "2", "--recent", "0.1"];
    let report = json_of(fixed.chain(budgets).chain(options));
    let rows = report["policies"].as_array().expect("policies");
    assert_eq!(rows.len(), 7);
    for row in rows {
        assert_eq!(row["tasks"][0]["samples"], 5);
        // Neither looks at what the question looks at.
        let misses = ["pyramidinfer", "h2o", "fastkv+h2o"].iter().any(|name| row["policy"] == *name);
        let least = if misses { 0 } else { 4 };
        assert!(row["tasks"][0]["exact"].as_u64().expect("a count") >= least, "{row}");
    }
}

#[test]
fn a_question_behind_a_full_cache_is_answered() {
    let scores = exact(&["--policies", "full", "--query-agnostic"]);
    assert!(scores[0] >= 11, "{scores:?}");
}

#[test]
fn scores_of_heads_become_budgets() {
    let scratch = Scratch::new();
    let [model, file] = [needle(), scratch.path("heads.json")].map(|path| path.into_os_string());
    let [model, file] = [model, file].map(|path| path.into_string().expect("a plain path"));
    let short = ["--tokens", "200", "--samples", "3", "--model", &model];
    for scoring in ["retrieval", "reasoning"] {
        let options = ["profile", "heads", "--scoring", scoring, "--force", "--out", &file];
        let text = stdout_of(options.into_iter().chain(short));
        assert!(text.contains("of 3 prompts answered right"), "{text}");
        let scores = read_json(scratch.path("heads.json").as_path());
        let scores = scores.as_object().expect("an object");
        assert_eq!(scores.len(), 6 * 8);
        // The facts are found in layers 2 and 3 (models/needle/README.md).
        let mean = |head: &str| {
            let samples = scores[head].as_array().expect("samples");
            samples.iter().map(|score| score.as_f64().expect("a number")).sum::<f64>() / samples.len() as f64
        };
        let best = scores.keys().max_by(|a, b| mean(a).total_cmp(&mean(b))).expect("a head");
        assert!(mean(best) > 0.3 && ["2", "3", "4"].contains(&&best[..1]), "{best}: {}", mean(best));
    }
    let options =
        ["eval", "--policies", "headkv,fastkv+headkv", "--heads", &file, "--retention", "0.25", "--json"];
    let short =
        ["--tokens", "400", "--samples", "3", "--tasks", "single", "--window", "8", "--model", &model];
    let report = json_of(options.into_iter().chain(short));
    assert!(report["policies"][0]["tasks"][0]["exact"].as_u64().expect("a count") >= 2, "{report}");
}

#[test]
fn profiles_say_what_to_choose() {
    let model = needle();
    let model = model.to_str().expect("a plain path");
    let tsp = ["profile", "tsp", "--tokens", "200", "--samples", "2", "--rates", "0.5,1.0", "--model", model];
    let text = stdout_of(tsp);
    assert!(text.contains("recommended: --tsp-layer"), "{text}");
    assert!(text.matches("2 of 2").count() >= 5, "ρ = 1 changes nothing: {text}");
    refused(tsp.into_iter().chain(["--agreement", "2"]), 2, &["--agreement 2"]);
    refused(tsp.into_iter().chain(["--rates", "1.5"]), 2, &["propagation is 1.5"]);
    let report = json_of(tsp.into_iter().chain(["--json"]));
    let candidates = report["candidates"].as_array().expect("a list");
    assert_eq!(candidates.len(), 2 * 6, "five layers and auto, at two rates");
    let number = |candidate: &Value, field: &str| candidate[field].as_f64().expect("a number");
    for (index, candidate) in candidates.iter().enumerate() {
        let layer = candidate["tsp_layer"].as_u64();
        assert_eq!(layer, (index % 6 < 5).then_some(index as u64 % 6));
        let (rate, cost) = (number(candidate, "propagation"), number(candidate, "cost"));
        if let Some(layer) = layer {
            let expected = ((layer + 1) as f64 + (5 - layer) as f64 * rate) / 6.0;
            assert!((cost - expected).abs() < 0.01, "{cost} of the rows, not {expected}");
        }
        let error = number(candidate, "hidden_error");
        assert!(if rate == 1.0 { error < 1e-6 } else { error > 1e-3 }, "{candidate}");
    }
    let best = &report["recommended"];
    assert_eq!(best["same_answers"], 2, "at the agreement asked for");
    let cheaper = candidates.iter().filter(|other| number(other, "cost") < number(best, "cost"));
    assert!(cheaper.into_iter().all(|other| other["same_answers"] != 2), "{report}");
    let prompt = stdout_of(["prompt", "--tokens", "300", "--facts", "4", "--model", model]);
    let report =
        json_of(["profile", "fastgen", "--recovery", "0.8", "--json", "--model", model, prompt.trim()]);
    for layer in report["layers"].as_array().expect("layers") {
        for (set, kept) in
            layer["sets"].as_array().expect("sets").iter().zip(layer["kept"].as_array().expect("lists"))
        {
            let recovered: Vec<f64> = serde_json::from_value(set["recovered"].clone()).expect("numbers");
            assert!(recovered.windows(2).all(|pair| pair[0] <= pair[1] + 1e-5), "{recovered:?}");
            let names = ["special", "punctuation", "frequent", "local"];
            let first = recovered.iter().position(|mass| *mass >= 0.8);
            assert_eq!(set["set"], first.map_or("full", |index| names[index]));
            let kept = kept.as_array().expect("positions").len() as u64;
            assert_eq!(kept == layer["rows"], set["set"] == "full");
        }
    }
    let text = stdout_of(["profile", "fastgen", "--model", model, prompt.trim()]);
    assert!(text.contains("the cache is"), "{text}");
}
