//! What the answers come to, by policy, task and length.

use std::path::Path;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use serde_json::Value;

use super::arms::Arm;

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Report<'a> {
    pub(super) model: &'a Path,
    pub(super) device: &'a str,
    pub(super) lengths: &'a [usize],
    pub(super) prompt_seed: u64,
    pub(super) query_agnostic: bool,
    /// Whether Ctrl-C left prompts out.
    pub(super) cancelled: bool,
    pub(super) policies: Vec<Row>,
}

/// A policy's scores.
#[derive(Serialize)]
pub(super) struct Row {
    policy: String,
    options: Value,
    retention: Value,
    #[serde(skip)]
    label: String,
    tasks: Vec<Tally>,
}

/// Answers to the prompts of a task at a length.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Tally {
    task: String,
    tokens: usize,
    samples: u32,
    /// Answers that were exactly right.
    exact: u32,
    /// Mean score, from 0 to 100; `null` without answers.
    score: Option<f64>,
}

impl Row {
    pub(super) fn new(arm: &Arm, with_budget: bool) -> Self {
        Self {
            policy: arm.name.clone(),
            options: arm.options.clone(),
            retention: arm.retention.clone(),
            label: arm.label(with_budget),
            tasks: Vec::new(),
        }
    }

    /// Counts an answer.
    pub(super) fn add(&mut self, task: &str, tokens: usize, score: f64, exact: bool) {
        let found = self.tasks.iter().position(|tally| tally.task == task && tally.tokens == tokens);
        let index = found.unwrap_or_else(|| {
            self.tasks.push(Tally { task: task.to_owned(), tokens, samples: 0, exact: 0, score: None });
            self.tasks.len() - 1
        });
        let tally = &mut self.tasks[index];
        let sum = tally.score.unwrap_or(0.0) * f64::from(tally.samples) + score;
        tally.samples += 1;
        tally.exact += u32::from(exact);
        tally.score = Some(sum / f64::from(tally.samples));
    }
}

/// A table for each length: policies down, tasks across.
pub(super) fn readable(report: &Report<'_>) -> String {
    let setting = match report.query_agnostic {
        true => "compressed before the question",
        false => "question in the prompt",
    };
    let mut text = String::new();
    for tokens in report.lengths {
        let tallies =
            |row: &Row| row.tasks.iter().filter(|tally| tally.tokens == *tokens).cloned().collect::<Vec<_>>();
        let columns = report.policies.first().map(&tallies).unwrap_or_default();
        if columns.is_empty() {
            continue;
        }
        let mut table = Table::new();
        let header = columns.iter().map(|tally| format!("{} (n = {})", tally.task, tally.samples));
        table.load_style(UTF8_FULL_CONDENSED).set_header(["policy".to_owned()].into_iter().chain(header));
        for row in &report.policies {
            let tallies = tallies(row);
            let cell = |column: &Tally| {
                tallies.iter().find(|tally| tally.task == column.task).map_or("–".to_owned(), cell)
            };
            table.add_row([row.label.clone()].into_iter().chain(columns.iter().map(cell)));
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        text += &format!("scores at {tokens} tokens, {setting}, on {}\n{table}\n", report.device);
    }
    if report.cancelled {
        text += "cancelled: what was measured by then\n";
    }
    text
}

/// The mean score, and the share of exact answers where that is another number.
fn cell(tally: &Tally) -> String {
    let score = tally.score.unwrap_or(0.0);
    let exact = 100.0 * f64::from(tally.exact) / f64::from(tally.samples.max(1));
    match (score - exact).abs() < 0.5 {
        true => format!("{score:.0} %"),
        false => format!("{score:.0} % ({exact:.0} % exact)"),
    }
}
