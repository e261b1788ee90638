//! Ctrl-C.
#![cfg(unix)]

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::{Scratch, edit_json, program};

/// A model and a prompt whose answer takes longer than any test.
fn endless(scratch: &Scratch) -> [PathBuf; 2] {
    let model = scratch.model("bf16-gqa4");
    edit_json(&model.join("config.json"), |config| {
        config["max_position_embeddings"] = json!(1_000_000);
        config["eos_token_id"] = Value::Null;
    });
    [model, scratch.file("tokens.json", "[1, 2, 3]")]
}

fn generate(scratch: &Scratch, more: &[&str]) -> Child {
    let [model, tokens] = endless(scratch);
    let mut command = program();
    command.arg("generate").arg("--model").arg(model).arg("--tokens").arg(tokens);
    command.args(["--policy", "full", "--max-tokens", "400000"]).args(more);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
}

fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("there is a kill").success());
}

fn assert_ends_soon(child: &mut Child) {
    let start = Instant::now();
    while child.try_wait().expect("a child").is_none() {
        if start.elapsed() > Duration::from_secs(60) {
            child.kill().expect("a child");
            panic!("did not stop");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_was_generated_so_far_stays() {
    let scratch = Scratch::new();
    let mut child = generate(&scratch, &[]);
    // The first byte says that it is generating.
    let mut stdout = child.stdout.take().expect("piped");
    let mut first = [0];
    stdout.read_exact(&mut first).expect("an answer begins");
    interrupt(&child);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).expect("UTF-8");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(130));
    assert!(first[0].is_ascii_digit() && rest.ends_with('\n'), "{rest}");
    let figures = String::from_utf8_lossy(&output.stderr);
    assert!(figures.contains("cancelled") && figures.contains("TTFT"), "{figures}");
}

#[test]
fn json_is_whole_and_says_so() {
    let scratch = Scratch::new();
    let mut child = generate(&scratch, &["--json"]);
    wait_for_handler(&child);
    interrupt(&child);
    let mut stdout = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut stdout).expect("UTF-8");
    assert_ends_soon(&mut child);
    assert_eq!(child.wait().expect("it ended").code(), Some(130));
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(report["finish"], "cancelled");
    assert!(report["tokens"].is_array());
}

#[test]
fn compare_keeps_what_it_has() {
    let scratch = Scratch::new();
    let [model, tokens] = endless(&scratch);
    let out = scratch.path("report.json");
    let mut command = program();
    command.arg("compare").arg("--model").arg(model).arg("--tokens").arg(tokens).arg("--out").arg(&out);
    command.args(["--policies", "full,random", "--max-tokens", "400000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    wait_for_handler(&child);
    interrupt(&child);
    assert_ends_soon(&mut child);
    assert_eq!(child.wait().expect("it ended").code(), Some(130));
    let report = super::support::read_json(&out);
    assert_eq!(report["cancelled"], true);
}

#[test]
fn bench_keeps_what_it_has() {
    let scratch = Scratch::new();
    let out = scratch.path("speed.json");
    let mut command = program();
    command.args(["bench", "--shape", "tiny", "--device", "cpu", "--tokens", "64,60000", "--repeat", "1000"]);
    let command = command.arg("--out").arg(&out).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    wait_for_handler(&child);
    interrupt(&child);
    assert_ends_soon(&mut child);
    assert_eq!(child.wait().expect("it ended").code(), Some(130));
    let report = super::support::read_json(&out);
    assert_eq!((&report["fastkv"], &report["cancelled"]), (&json!("bench"), &json!(true)));
    let measured = report["measured"].as_array().expect("rows");
    assert!(measured.iter().all(|row| row["tokens"] == 64), "there was no time for more");
}

#[test]
fn selection_stops() {
    let mut command = program();
    command.args(["profile", "selection", "--tokens", "2000", "--samples", "1000000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    wait_for_handler(&child);
    interrupt(&child);
    assert_ends_soon(&mut child);
    assert_eq!(child.wait().expect("it ended").code(), Some(130));
}

/// Before the program listens for Ctrl-C, the signal would end it as it ends any program.
fn wait_for_handler(child: &Child) {
    let status = format!("/proc/{}/status", child.id());
    let listens = || {
        let text = std::fs::read_to_string(&status).ok()?;
        let caught = text.lines().find_map(|line| line.strip_prefix("SigCgt:"))?;
        let caught = u64::from_str_radix(caught.trim(), 16).ok()?;
        (caught & 0b10 != 0).then_some(())
    };
    let start = Instant::now();
    while listens().is_none() && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(10));
    }
}
