//! What comes out, held to the fixtures' expectations and to the library's own results.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use fastkv::backend::cpu::CpuBackend;
use fastkv::engine::{Control, Engine, MemoryEstimate, MemoryOptions, PrefillOptions};
use fastkv::eval::{Dialect, NeedlePrompt};
use fastkv::model::ModelDir;
use fastkv::policy::{Budget, FastKv, Policy};
use serde_json::{Value, json};

use super::support::{
    Scratch, assert_well_formed, fixture, floats, json_of, needle, program, prompt_of, read_json, run,
    stderr, stdout_of,
};

/// `fastkv COMMAND --model FIXTURE --tokens …` on the fixture's longest prompt.
fn arguments(command: &str, model: &str, scratch: &Scratch, options: &[&str]) -> Vec<String> {
    let tokens = scratch.file("tokens.json", prompt_of(model)["ids"].to_string());
    let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let mut arguments = vec![command.to_owned(), "--model".to_owned(), path(&fixture(model))];
    arguments.extend(["--tokens".to_owned(), path(&tokens)]);
    arguments.extend(options.iter().map(|&option| option.to_owned()));
    arguments
}

#[test]
fn full_context_generates_what_transformers_does() {
    for model in ["bf16-gqa4", "bf16-llama3", "f16-gqa6-sharded", "f32-bias"] {
        let scratch = Scratch::new();
        let options = ["--policy", "full", "--max-tokens", "8", "--json"];
        let report = json_of(arguments("generate", model, &scratch, &options));
        let prompt = prompt_of(model);
        let greedy = prompt["greedy"].as_array().expect("tokens");
        // Some may reach a stop token, which an answer leaves out.
        let answer = report["tokens"].as_array().expect("tokens");
        assert_eq!(answer[..], greedy[..answer.len()], "{model}");
        let finish = if answer.len() == greedy.len() { "max_tokens" } else { "stop" };
        assert_eq!(report["finish"], finish, "{model}");
        assert_eq!(report["prompt_tokens"], prompt["ids"].as_array().expect("tokens").len());
        assert_eq!(report["kv_kept_bytes"], report["kv_full_bytes"]);
        assert!(report["ttft_s"].as_f64().expect("a time") > 0.0);
        assert!(report["decode_tokens_per_s"].as_f64().expect("a rate") > 0.0);
    }
}

#[test]
fn without_json_the_answer_is_stdout_and_figures_are_stderr() {
    let scratch = Scratch::new();
    let options = ["--policy", "full", "--max-tokens", "4"];
    let output = run(arguments("generate", "bf16-gqa4", &scratch, &options));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "71 68 0 23\n");
    let figures = stderr(&output);
    for part in ["96 tokens read, 4 written", "TTFT", "tokens/s", "KV cache 24.00 KiB of 24.00 KiB", "peak"] {
        assert!(figures.contains(part), "{part}: {figures}");
    }
}

#[test]
fn sampling_follows_its_seed() {
    let scratch = Scratch::new();
    let sample = |seed: &str| {
        let options = ["--temperature", "2", "--top-p", "0.95", "--sampling-seed", seed, "--json"];
        json_of(arguments("generate", "bf16-gqa4", &scratch, &options))["tokens"].clone()
    };
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
}

#[test]
fn answers_end_at_stop_tokens_and_texts() {
    let scratch = Scratch::new();
    let generate = |stop: &str| {
        let options = ["--policy", "full", "--stop", stop, "--json"];
        json_of(arguments("generate", "bf16-gqa4", &scratch, &options))
    };
    let report = generate("23");
    assert_eq!((&report["tokens"], &report["finish"]), (&json!([71, 68, 0]), &json!("stop")));

    let model = needle();
    let prompt =
        "the magic number for quiet otter is 17 36 82 . question : the magic number for quiet otter is";
    let base = ["generate", "--policy", "full", "--json", "--model", model.to_str().expect("UTF-8"), prompt];
    assert_eq!(json_of(base)["text"], "17 36 82");
    let report = json_of(base.into_iter().chain(["--stop", " 36"]));
    assert_eq!((&report["text"], &report["finish"]), (&json!("17"), &json!("stop")));
}

#[test]
fn a_prompt_is_the_same_from_wherever_it_comes() {
    let scratch = Scratch::new();
    let model = needle();
    let prompt =
        "the magic number for quiet otter is 17 36 82 . question : the magic number for quiet otter is";
    let file = scratch.file("prompt.txt", format!("{prompt}\n"));
    let base = ["generate".as_ref(), "--policy".as_ref(), "full".as_ref()];
    let expected = "17 36 82\n";

    let mut command = program();
    command.args(base).env("FASTKV_MODEL", &model);
    let argument = command.arg(prompt).output().expect("it starts");
    assert_eq!(String::from_utf8_lossy(&argument.stdout), expected);

    let more = ["--model".as_ref(), model.as_os_str(), "--file".as_ref(), file.as_os_str()];
    assert_eq!(stdout_of(base.into_iter().chain(more)), expected);

    let mut command: Command = program();
    command.args(base).arg("--model").arg(&model).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    child.stdin.take().expect("piped").write_all(format!("{prompt}\n").as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

#[test]
fn a_question_is_read_behind_the_compressed_prompt() {
    let model = needle();
    let model = model.to_str().expect("UTF-8");
    let dialect = Dialect::from_directory(&needle()).expect("a dialect");
    let task = dialect.task("single").expect("a task");
    let prompt = NeedlePrompt::generate(&dialect, task, 600, 1).expect("a prompt");
    let ask = |policy: &[&str]| {
        let base = ["generate", "--json", "--model", model, &prompt.context, "--question", &prompt.question];
        json_of(base.iter().chain(policy))
    };
    let report = ask(&["--policy", "full"]);
    assert_eq!(report["text"], prompt.answer);
    assert_eq!(report["question_tokens"], prompt.question.split(' ').count());
    let report = ask(&["--policy", "streamingllm", "--retention", "64"]);
    let kept = report["kv_kept_bytes"].as_u64().expect("bytes");
    assert_eq!(kept, 6 * 64 * 2 * 2 * 64 * 4, "64 tokens of 6 layers, the question not counted");
}

/// What is written takes the place of the file that a link leads to, with the mode that it had.
#[cfg(unix)]
#[test]
fn links_and_modes_stay() {
    use std::os::unix::fs::{PermissionsExt, symlink};

    let scratch = Scratch::new();
    let file = scratch.file("results.json", "");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("writable");
    let links = ["near.json", "far.json"].map(|name| scratch.path(name));
    symlink("results.json", &links[0]).expect("writable");
    symlink(&links[0], &links[1]).expect("writable");
    let out = links[1].to_str().expect("UTF-8");
    let options = ["--policy", "full", "--out", out];
    stdout_of(arguments("inspect", "bf16-gqa4", &scratch, &options));
    for link in links {
        assert!(fs::symlink_metadata(link).expect("a link").is_symlink());
    }
    assert_eq!(read_json(&file)["fastkv"], "inspect");
    assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o640);
}

#[test]
fn compare_puts_answers_beside_that_of_the_full_context() {
    let scratch = Scratch::new();
    let out = scratch.path("report.json");
    let out_path = out.to_str().expect("UTF-8");
    let options =
        ["--max-tokens", "8", "--repeat", "2", "--retention", "40", "--sinks", "2", "--out", out_path];
    let text = stdout_of(arguments("compare", "bf16-gqa4", &scratch, &options));
    for part in ["96 tokens", "streamingllm", "speed-up", "full: [71, 68, 0, 23, 14, 57, 50, 26]"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let report = read_json(&out);
    assert_eq!(scratch.names().len(), 2, "tokens.json and the report");
    assert_eq!(report["kv_full_bytes"], 96 * 2 * 2 * 2 * 8 * 4);
    let policies = report["policies"].as_array().expect("policies");
    let names: Vec<&str> = policies.iter().filter_map(|row| row["policy"].as_str()).collect();
    assert_eq!(names, ["full", "fastkv", "snapkv", "streamingllm"]);
    for row in policies {
        let name = &row["policy"];
        let generate = ["--policy", name.as_str().expect("a name"), "--max-tokens", "8", "--json"];
        let own: &[&str] = match name.as_str() {
            Some("full") => &[],
            Some("streamingllm") => &["--retention", "40", "--sinks", "2"],
            _ => &["--retention", "40"],
        };
        let alone = json_of(arguments("generate", "bf16-gqa4", &scratch, &[&generate, own].concat()));
        for field in ["tokens", "finish", "kv_kept_bytes", "kv_peak_bytes", "plan"] {
            assert_eq!(row[field], alone[field], "{field} of {name}");
        }
        assert_eq!(row["runs"], 2);
        let same = row["tokens"] == policies[0]["tokens"];
        assert_eq!(row["agreement"]["same_answer"], same);
        assert_eq!(row["agreement"]["equal_leading_tokens"] == 1.0, same);
        assert!(row["ttft_speedup"].as_f64().expect("a ratio") > 0.0);
    }
    assert_eq!(policies[0]["ttft_speedup"], 1.0);
    assert_eq!(policies[0]["kv_kept_share"], 1.0);
    let share = policies[3]["kv_kept_share"].as_f64().expect("a share");
    assert!((share - 40.0 / 96.0).abs() < 1e-9);

    let report = json_of(arguments("compare", "bf16-gqa4", &scratch, &["--policies", "snapkv", "--json"]));
    assert_eq!(report["policies"][0]["agreement"], Value::Null, "there is nothing to agree with");
}

/// The library's own prefill, in the fields of `fastkv inspect`.
fn prefill(model: &str, policy: &Policy) -> Value {
    let model_dir = ModelDir::open(fixture(model)).expect("a model");
    let engine = Engine::load(CpuBackend::new(None).expect("threads"), &model_dir).expect("it loads");
    let ids: Vec<u32> = serde_json::from_value(prompt_of(model)["ids"].clone()).expect("ids");
    let plan = policy.plan(engine.shape(), ids.len()).expect("a plan");
    let options = PrefillOptions { trace: true, ..Default::default() };
    let prefill = engine.prefill(&ids, &plan, &options, &Control::default()).expect("it runs");
    let layers = prefill.trace.expect("asked for").layers;
    json!({
        "kept": layers.iter().map(|layer| &layer.kept).collect::<Vec<_>>(),
        "propagated": layers.iter().map(|layer| &layer.propagated).collect::<Vec<_>>(),
        "rows": layers.iter().map(|layer| layer.rows).collect::<Vec<_>>(),
        "plan": plan,
        "tokens": ids,
        "kv_kept_bytes": prefill.cache.bytes(engine.backend()),
        "kv_peak_bytes": prefill.peak_kv_bytes,
        "mass": layers.iter().map(|layer| &layer.mass).collect::<Vec<_>>(),
        "logits": prefill.logits,
    })
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0_f64, |scale, value| scale.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= tolerance * scale, "{what}: {found} for {expected}");
    }
}

#[test]
fn inspect_shows_what_the_library_kept() {
    for model in ["bf16-gqa4", "f32-mha"] {
        let scratch = Scratch::new();
        let options = ["--retention", "0.25", "--propagation", "0.5", "--tsp-layer", "0"];
        let report = json_of(arguments("inspect", model, &scratch, &options));
        let policy = Policy::FastKv(FastKv {
            retention: Budget::Rate(0.25),
            propagation: Budget::Rate(0.5),
            tsp_layer: Some(0),
            ..FastKv::proportional()
        });
        let expected = prefill(model, &policy);
        for field in ["kept", "propagated", "rows", "plan", "tokens", "kv_kept_bytes", "kv_peak_bytes"] {
            assert_eq!(report[field], expected[field], "{field} of {model}");
        }
        assert_close(&floats(&report["logits"]), &floats(&expected["logits"]), 1e-6, "logits");
        for (layer, expected) in expected["mass"].as_array().expect("layers").iter().enumerate() {
            assert_close(&floats(&report["mass"][layer]), &floats(expected), 1e-6, "mass");
        }
        assert!(report["propagated"][0].is_array() && report["propagated"][1].is_null());
        assert!(report.get("continuation").is_none());
    }
}

#[test]
fn inspect_says_where_tokens_went_on() {
    let scratch = Scratch::new();
    let model = needle();
    let prompt = stdout_of(["prompt", "--tokens", "200", "--model", model.to_str().expect("UTF-8")]);
    let file = scratch.path("prompt.txt");
    fs::write(&file, prompt).expect("written");
    let base =
        ["inspect", "--model", model.to_str().expect("UTF-8"), "--file", file.to_str().expect("UTF-8")];
    let inspect = |options: &[&str]| json_of(base.iter().chain(options));
    for (overlap, last) in [("0", "4"), ("1", "4"), ("0.5", "2")] {
        let candidates = format!("1-{last}");
        let auto = inspect(&["--tsp-layer", &candidates, "--tsp-overlap", overlap]);
        let settled = &auto["settled"];
        let picked = settled["layer"].as_u64().expect("a layer");
        let overlaps = settled["overlaps"].as_array().expect("a list");
        assert_eq!(overlaps.len() as u64, picked - 1, "from the second candidate on");
        let wanted: f64 = overlap.parse().expect("a number");
        let reaches = |overlap: &Value| overlap["share"].as_f64().expect("a share") >= wanted;
        assert!(overlaps.iter().rev().skip(1).all(|overlap| !reaches(overlap)), "{overlaps:?}");
        assert!(overlaps.last().is_some_and(reaches) || picked.to_string() == last, "{overlaps:?}");
        let fixed = inspect(&["--tsp-layer", &picked.to_string()]);
        for field in ["kept", "propagated", "rows"] {
            assert_eq!(auto[field], fixed[field], "{field}, overlap {overlap}");
        }
        assert!(fixed.get("settled").is_none());
        assert_close(&floats(&auto["logits"]), &floats(&fixed["logits"]), 1e-5, "logits");
    }
    let out = scratch.path("kept.json");
    let table = stdout_of(base.iter().chain(&["--tsp-layer", "auto", "--out", out.to_str().expect("UTF-8")]));
    assert!(table.contains("tokens go on from layer"), "{table}");
}

#[test]
fn inspect_of_the_full_context_has_the_logits_of_transformers() {
    for model in ["bf16-gqa4", "f32-dynamic"] {
        let scratch = Scratch::new();
        for shortcuts in [&["--no-shortcuts"][..], &[]] {
            let options = [&["--policy", "full", "--continue", "8"], shortcuts].concat();
            let report = json_of(arguments("inspect", model, &scratch, &options));
            let prompt = prompt_of(model);
            let expected = prompt["logits"].as_array().and_then(|rows| rows.last()).expect("logits");
            assert_close(&floats(&report["logits"]), &floats(expected), 1e-4, model);
            assert_eq!(report["continuation"], prompt["greedy"], "{model}");
            assert_eq!(report["continuation_finish"], "max_tokens");
            let masses = report["mass"].as_array().expect("layers").iter().flat_map(floats);
            assert!(masses.into_iter().all(|mass| (mass - 1.0).abs() < 1e-5), "everything was kept");
        }
    }
}

#[test]
fn inspect_with_out_prints_a_table() {
    let scratch = Scratch::new();
    let out = scratch.path("kept.json");
    let options = ["--out", out.to_str().expect("UTF-8"), "--retention", "20", "--propagation", "0.5"];
    let table = stdout_of(arguments("inspect", "bf16-gqa4", &scratch, &options));
    for part in ["FastKV: retention 20 tokens", "mass per kv head", " 48 ", "KV cache"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert_eq!(read_json(&out)["kept"][0][0].as_array().map(Vec::len), Some(20));
}

#[test]
fn pictures_are_well_formed_and_complete() {
    let scratch = Scratch::new();
    let [svg, html] = ["kept.svg", "kept.html"].map(|name| scratch.path(name));
    let options = ["--retention", "0.25", "--propagation", "0.5"];
    for file in [&svg, &html] {
        let options = [&options[..], &["--picture", file.to_str().expect("UTF-8")]].concat();
        stdout_of(arguments("inspect", "bf16-gqa4", &scratch, &options));
    }
    let [svg, html] = [svg, html].map(|file| fs::read_to_string(file).expect("written"));
    for picture in [&svg, &html] {
        assert_well_formed(picture);
        assert!(!picture.contains("http://") || !picture.contains("href"), "loads nothing");
        for row in ["layer 0, kv head 0", "layer 0, kv head 1", "layer 1, kv head 0", "layer 1, kv head 1"] {
            assert!(picture.contains(row), "{row}");
        }
        assert!(picture.contains("FastKV: retention 0.25 of the prompt, propagation 0.5 of the prompt"));
        assert!(picture.contains("48 tokens go on past layer 0"));
    }
    assert_eq!(html.matches("<span class=").count(), 96, "a token each");
    assert!(html.contains("title=\"position 95: kept by 4 of 4\""), "the window is kept everywhere");
    assert_eq!(scratch.names().len(), 3, "nothing beside tokens.json and the pictures");
}

#[test]
fn a_page_shows_the_text_of_the_prompt() {
    let scratch = Scratch::new();
    let file = scratch.path("kept.html");
    let model = needle();
    let prompt = "the magic number for quiet otter is 17 36 82 . <s> & question : the magic number";
    let base = ["inspect", "--model", model.to_str().expect("UTF-8"), prompt, "--picture"];
    stdout_of(base.into_iter().chain([file.to_str().expect("UTF-8")]));
    let html = fs::read_to_string(file).expect("written");
    assert_well_formed(&html);
    assert!(html.contains("otter</span>") && html.contains("&lt;s&gt;"), "text, escaped");
}

#[test]
fn info_tells_the_memory_of_every_policy() {
    let path = fixture("bf16-gqa4");
    let base = ["info".as_ref(), "--json".as_ref(), "--model".as_ref(), path.as_os_str()];
    let more = ["--tokens", "200", "--memory-limit", "1GiB"].map(AsRef::as_ref);
    let report = json_of(base.into_iter().chain(more));
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["model"]["context_tokens"], 256);
    assert_eq!(report["model"]["tokenizer"], "none");
    assert_eq!(report["memory_available_bytes"], 1 << 30);

    let model = ModelDir::open(&path).expect("a model");
    let backend = CpuBackend::new(None).expect("threads");
    let options = MemoryOptions::new(&backend, model.weights.total_bytes(), 0);
    let plan = Policy::FastKv(FastKv::proportional()).plan((&model.config).into(), 200).expect("a plan");
    let estimate = MemoryEstimate::new(&model.config, &plan, &options);
    let rows = report["memory"].as_array().expect("rows");
    let fastkv = rows.iter().find(|row| row["policy"] == "fastkv").expect("a row");
    let expected = serde_json::to_value(estimate).expect("JSON");
    for (field, value) in expected.as_object().expect("an object") {
        assert_eq!(&fastkv[field], value, "{field}");
    }
    assert_eq!(fastkv["total_bytes"], estimate.total());
    assert_eq!(fastkv["fits"], true);
    assert_eq!(rows.len(), 12, "every policy but headkv, which needs scores");

    let text = stdout_of(["info".as_ref(), "--model".as_ref(), path.as_os_str()]);
    for part in ["2 layers of 8 query heads over 2 kv heads", "BF16", "context 256", "fastkv-constant"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(stdout_of(["info"]).contains("none given"));
}

#[test]
fn cuda_is_refused_by_name_where_it_cannot_be_used() {
    let path = fixture("bf16-gqa4");
    let output =
        run(["info".as_ref(), "--model".as_ref(), path.as_os_str(), "--device".as_ref(), "cuda".as_ref()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--device cuda: "), "{}", stderr(&output));
}
