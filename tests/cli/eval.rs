//! `fastkv prompt` and `fastkv eval`: prompts whose answers are known, and who finds them.

use std::collections::HashSet;

use serde_json::Value;

use crate::support::{fixture, json_of, needle, refused, stdout_of};

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
    refused(["prompt", "--model", model, "--tokens", "20"], 1, &["19 tokens", "8 facts", "are the least"]);
    refused(["prompt", "--model", model, "--facts", "5000"], 1, &["5000 facts", "2304"]);
    refused(["prompt", "--model", model, "--facts", "0"], 1, &["0 facts"]);
    let other = fixture("bf16-gqa4");
    let other = other.to_str().expect("a plain path");
    refused(["prompt", "--model", other], 1, &["dialect.json"]);
    refused(["eval", "--model", model, "--tasks", "single,doble"], 1, &["'doble'", "hard, multikey, single"]);
    refused(["eval", "--model", model, "--samples", "0"], 2, &["--samples"]);
    refused(["eval", "--model", model, "--tokens", "20", "--policies", "full"], 1, &["are the least"]);
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
    let budgets = ["--retention", "0.125", "--propagation", "0.25", "--window", "8", "--samples", "6"];
    let policies = "pyramidkv,adakv,h2o,fastgen,pyramidinfer,fastkv+adakv,fastkv+h2o";
    let model = needle();
    let fixed = ["eval", "--suite", "quick", "--tasks", "multikey", "--json", "--model"];
    let fixed = fixed.into_iter().chain([model.to_str().expect("a plain path"), "--policy", policies]);
    let options = ["--tsp-layer", "2", "--recent", "0.1"];
    let report = json_of(fixed.chain(budgets).chain(options));
    let rows = report["policies"].as_array().expect("policies");
    assert_eq!(rows.len(), 7);
    for row in rows {
        assert_eq!(row["tasks"][0]["samples"], 6);
        let least = if row["policy"] == "pyramidinfer" { 0 } else { 4 };
        assert!(row["tasks"][0]["exact"].as_u64().expect("a count") >= least, "{row}");
    }
}

#[test]
fn a_question_behind_a_full_cache_is_answered() {
    let scores = exact(&["--policies", "full", "--query-agnostic"]);
    assert!(scores[0] >= 11, "{scores:?}");
}
