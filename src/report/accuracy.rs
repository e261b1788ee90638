//! Answers of an evaluation: scores over the budget, and over depth and length.

use std::collections::BTreeMap;

use serde_json::Value;

use super::chart::{Axis, Cell, Entry, Heat, Lines, Panel, Picture, Point, Series};
use super::results::{Answer, Evaluation};
use super::scale::{Kind, Scale, figures, tokens};
use super::section::{Figure, Section, Styles, Table, or_none, strings};
use crate::measure::median;

/// A policy with its options and its budget, and what it answered.
struct Arm<'a> {
    /// Arms that differ in their budget only have one name.
    name: String,
    retention: String,
    options: &'a Value,
    answers: Vec<&'a Answer>,
}

/// Mean scores of some answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tally {
    count: usize,
    sum: f64,
    exact: usize,
    kept: (f64, usize),
}

/// Depths that make rows of their own; more are put together in tenths.
const MOST_DEPTHS: usize = 21;

pub(super) fn section(file: &str, evaluation: &Evaluation, styles: &mut Styles) -> Section {
    let Evaluation { header, answers, cut } = evaluation;
    let arms = arms(answers);
    let mut facts = vec![
        ("model".to_owned(), header.model.clone()),
        ("device".to_owned(), header.device.clone()),
        ("version".to_owned(), header.version.clone()),
    ];
    let settings = header.settings.iter().filter(|(name, _)| !["model", "policies"].contains(&name.as_str()));
    facts.extend(settings.map(|(name, value)| (name.replace('_', " "), plain(value))));
    let mut notes = Vec::new();
    if *cut {
        notes.push("The last line was cut off in writing, and is left out.".to_owned());
    }
    if answers.is_empty() {
        notes.push("There are no answers in this file.".to_owned());
    }
    let setting = match header.settings.get("query_agnostic") {
        Some(Value::Bool(true)) => "compressed before the question",
        _ => "question in the prompt",
    };
    let subtitle = format!("{}; {setting}; {}", name_of(&header.model), header.device);
    let mut figures: Vec<Figure> = distinct(answers.iter().map(|answer| answer.tokens))
        .into_iter()
        .map(|length| Figure {
            name: format!("accuracy-{length}"),
            svg: over_budget(&arms, length, &subtitle, styles).svg(),
        })
        .collect();
    let mut tables = vec![options_table(&arms), scores_table(&arms, answers)];
    let with_depth = answers.iter().filter(|answer| answer.depth.is_some());
    for task in distinct(with_depth.map(|answer| answer.task.as_str())) {
        let map = DepthMap::new(&arms, task);
        figures.push(Figure { name: format!("depth-{task}"), svg: map.picture(&subtitle).svg() });
        tables.push(map.table());
    }
    tables.retain(|table| !table.rows.is_empty());
    Section { title: format!("Answers: {file}"), facts, notes, figures, tables }
}

/// The arms in the order of their first answers.
fn arms(answers: &[Answer]) -> Vec<Arm<'_>> {
    let mut arms: Vec<Arm<'_>> = Vec::new();
    let mut kinds: Vec<(&str, Value)> = Vec::new();
    for answer in answers {
        let retention = plain(&answer.retention);
        let same = |arm: &&mut Arm<'_>| {
            arm.answers[0].policy == answer.policy
                && arm.retention == retention
                && *arm.options == answer.options
        };
        if let Some(arm) = arms.iter_mut().find(same) {
            arm.answers.push(answer);
            continue;
        }
        let kind = (answer.policy.as_str(), without_budget(&answer.options));
        if !kinds.contains(&kind) {
            kinds.push(kind.clone());
        }
        let number = kinds.iter().filter(|(policy, _)| *policy == kind.0).position(|known| *known == kind);
        let name = match number {
            None | Some(0) => answer.policy.clone(),
            Some(number) => format!("{} ({})", answer.policy, number + 1),
        };
        arms.push(Arm { name, retention, options: &answer.options, answers: vec![answer] });
    }
    arms
}

fn without_budget(options: &Value) -> Value {
    match options {
        Value::Object(fields) => {
            let others = fields.iter().filter(|(name, _)| *name != "retention");
            Value::Object(others.map(|(name, value)| (name.clone(), without_budget(value))).collect())
        }
        other => other.clone(),
    }
}

impl Arm<'_> {
    fn label(&self) -> String {
        if self.retention.is_empty() {
            self.name.clone()
        } else {
            format!("{} {}", self.name, self.retention)
        }
    }

    fn tally(&self, wanted: impl Fn(&Answer) -> bool) -> Option<Tally> {
        Tally::of(self.answers.iter().copied().filter(|answer| wanted(answer)))
    }
}

impl Tally {
    fn of<'a>(answers: impl Iterator<Item = &'a Answer>) -> Option<Self> {
        let mut tally = Self::default();
        for answer in answers {
            tally.count += 1;
            tally.sum += answer.score;
            tally.exact += usize::from(answer.exact);
            if let Some(share) = answer.kept_share() {
                tally.kept = (tally.kept.0 + share, tally.kept.1 + 1);
            }
        }
        (tally.count > 0).then_some(tally)
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }

    fn kept_share(&self) -> Option<f64> {
        (self.kept.1 > 0).then(|| self.kept.0 / self.kept.1 as f64)
    }

    /// Wilson's 95 % interval of the mean score: for scores between 0 and 100 wider than need be, never too narrow.
    fn interval(&self) -> [f64; 2] {
        const Z: f64 = 1.959_963_984_540_054;
        let (n, share) = (self.count as f64, self.mean() / 100.0);
        let middle = share + Z * Z / (2.0 * n);
        let half = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).max(0.0).sqrt();
        [middle - half, middle + half].map(|end| (100.0 * end / (1.0 + Z * Z / n)).clamp(0.0, 100.0))
    }
}

/// A panel for each task: scores over the share of the cache that was kept.
fn over_budget(arms: &[Arm<'_>], length: usize, subtitle: &str, styles: &mut Styles) -> Picture {
    let here = arms.iter().flat_map(|arm| &arm.answers).filter(|answer| answer.tokens == length);
    let tasks = distinct(here.map(|answer| answer.task.as_str()));
    let names = distinct(arms.iter().map(|arm| arm.name.as_str()));
    let mut panels = Vec::new();
    for task in tasks {
        let mut series = Vec::new();
        for name in &names {
            let same = arms.iter().filter(|arm| arm.name == *name);
            let tallies =
                same.filter_map(|arm| arm.tally(|answer| answer.tokens == length && answer.task == task));
            let point = |tally: Tally| {
                let range = Some(tally.interval());
                tally.kept_share().map(|share| Point { x: 100.0 * share, y: tally.mean(), range })
            };
            let mut points: Vec<Point> = tallies.filter_map(point).collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            series.push(Series { name: (*name).to_owned(), style: styles.of(name), dashed: false, points });
        }
        let budgets = series.iter().flat_map(|series| &series.points).map(|point| point.x);
        panels.push(Panel::Lines(Lines {
            title: task.to_owned(),
            x: Axis {
                label: "KV cache kept, % of full".to_owned(),
                scale: Scale::new(Kind::Log, budgets),
                spell: figures,
            },
            y: Axis {
                label: "score".to_owned(),
                scale: Scale::new(Kind::Percent, []),
                spell: |score| format!("{score:.1}").trim_end_matches(".0").to_owned(),
            },
            series,
        }));
    }
    let legend =
        names.iter().map(|name| Entry { style: styles.of(name), dashed: false, name: (*name).to_owned() });
    Picture {
        title: format!("Accuracy over budget, {} tokens", tokens(length as f64)),
        subtitle: format!("{subtitle}; bars: 95 % (Wilson)"),
        legend: legend.collect(),
        panels,
    }
}

/// Scores of a task by depth and length, for each arm.
struct DepthMap<'a> {
    task: &'a str,
    lengths: Vec<usize>,
    rows: Vec<String>,
    /// For each arm, each row and each length.
    arms: Vec<(&'a Arm<'a>, Vec<Vec<Option<Cell>>>)>,
}

impl<'a> DepthMap<'a> {
    fn new(arms: &'a [Arm<'a>], task: &'a str) -> Self {
        let wanted = |answer: &&&Answer| answer.task == task && answer.depth.is_some();
        let here: Vec<&Answer> = arms.iter().flat_map(|arm| &arm.answers).filter(wanted).copied().collect();
        let lengths = distinct(here.iter().map(|answer| answer.tokens));
        let mut depths: Vec<f64> = here.iter().filter_map(|answer| answer.depth).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        let own = depths.len() <= MOST_DEPTHS;
        let row = |depth: f64| match own {
            true => depths.partition_point(|known| *known < depth),
            false => ((depth * 10.0) as usize).min(9),
        };
        let rows: Vec<String> = match own {
            true => depths.iter().map(|depth| figures(100.0 * depth)).collect(),
            false => (0..10).map(|tenth| format!("{}–{}", 10 * tenth, 10 * tenth + 10)).collect(),
        };
        let cells = |arm: &Arm<'_>| -> Vec<Vec<Option<Cell>>> {
            let mut sums: BTreeMap<(usize, usize), Vec<&Answer>> = BTreeMap::new();
            for answer in arm.answers.iter().filter(|answer| answer.task == task) {
                if let Some(depth) = answer.depth {
                    sums.entry((row(depth), answer.tokens)).or_default().push(answer);
                }
            }
            let cell = |row: usize, length: usize| {
                let tally = Tally::of(sums.get(&(row, length))?.iter().copied())?;
                Some(Cell { percent: tally.mean(), count: tally.count })
            };
            (0..rows.len()).map(|row| lengths.iter().map(|length| cell(row, *length)).collect()).collect()
        };
        let drawn = arms.iter().map(|arm| (arm, cells(arm)));
        let drawn = drawn.filter(|(_, cells)| cells.iter().flatten().any(Option::is_some)).collect();
        Self { task, lengths, rows, arms: drawn }
    }

    fn picture(&self, subtitle: &str) -> Picture {
        let columns = || self.lengths.iter().map(|length| tokens(*length as f64)).collect();
        let panel = |(arm, cells): &(&Arm<'_>, Vec<Vec<Option<Cell>>>)| {
            Panel::Heat(Heat {
                title: arm.label(),
                x_label: "tokens".to_owned(),
                y_label: "depth, %".to_owned(),
                columns: columns(),
                rows: self.rows.clone(),
                cells: cells.clone(),
            })
        };
        Picture {
            title: format!("{}: score by depth and length", self.task),
            subtitle: subtitle.to_owned(),
            legend: Vec::new(),
            panels: self.arms.iter().map(panel).collect(),
        }
    }

    fn table(&self) -> Table {
        let mut header = strings(["policy", "retention", "depth, %"]);
        header.extend(self.lengths.iter().map(|length| tokens(*length as f64)));
        let mut rows = Vec::new();
        for (arm, cells) in &self.arms {
            for (depth, cells) in self.rows.iter().zip(cells) {
                let mut row = vec![arm.name.clone(), arm.retention.clone(), depth.clone()];
                let cell = |cell: &Cell| format!("{:.1} (n = {})", cell.percent, cell.count);
                row.extend(cells.iter().map(|found| or_none(found.as_ref().map(cell))));
                rows.push(row);
            }
        }
        Table { caption: format!("{}: mean score by depth and length", self.task), header, rows, words: 2 }
    }
}

fn options_table(arms: &[Arm<'_>]) -> Table {
    let rows = arms.iter().map(|arm| vec![arm.name.clone(), arm.retention.clone(), arm.options.to_string()]);
    Table {
        caption: "Policies and their options".to_owned(),
        header: strings(["policy", "retention", "options"]),
        rows: rows.collect(),
        words: 3,
    }
}

fn scores_table(arms: &[Arm<'_>], answers: &[Answer]) -> Table {
    let header =
        ["tokens", "task", "policy", "retention", "n", "score", "95 %", "exact, %", "KV kept, %", "TTFT, s"];
    let mut rows = Vec::new();
    for length in distinct(answers.iter().map(|answer| answer.tokens)) {
        for task in distinct(answers.iter().map(|answer| answer.task.as_str())) {
            for arm in arms {
                let wanted = |answer: &Answer| answer.tokens == length && answer.task == task;
                let Some(tally) = arm.tally(wanted) else { continue };
                let times =
                    arm.answers.iter().filter(|answer| wanted(answer)).filter_map(|answer| answer.ttft_s);
                let [low, high] = tally.interval();
                rows.push(vec![
                    tokens(length as f64),
                    task.to_owned(),
                    arm.name.clone(),
                    arm.retention.clone(),
                    tally.count.to_string(),
                    format!("{:.1}", tally.mean()),
                    format!("{low:.1}–{high:.1}"),
                    format!("{:.1}", 100.0 * tally.exact as f64 / tally.count as f64),
                    or_none(tally.kept_share().map(|share| format!("{:.1}", 100.0 * share))),
                    or_none(median(&times.collect::<Vec<_>>()).map(figures)),
                ]);
            }
        }
    }
    let caption = "Mean scores with Wilson's interval; KV kept is a mean, TTFT a median".to_owned();
    Table { caption, header: strings(header), rows, words: 4 }
}

/// Values in order, each once: numbers ascend, names come as they first did.
fn distinct<T: Distinct>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut seen: Vec<T> = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    T::arrange(&mut seen);
    seen
}

trait Distinct: PartialEq + Sized {
    fn arrange(values: &mut [Self]);
}

impl Distinct for usize {
    fn arrange(values: &mut [Self]) {
        values.sort_unstable();
    }
}

impl Distinct for &str {
    fn arrange(_: &mut [Self]) {}
}

/// A value without JSON's quotes; nothing for null.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The last part of a path.
pub(super) fn name_of(path: &str) -> String {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_wilsons() {
        let tally = |count, sum| Tally { count, sum, exact: 0, kept: (0.0, 0) };
        // 8 of 10: 0.4902 to 0.9433, from the published formula by hand.
        let [low, high] = tally(10, 800.0).interval();
        assert!((low - 49.02).abs() < 0.01 && (high - 94.33).abs() < 0.01, "{low} {high}");
        let [low, high] = tally(12, 1200.0).interval();
        assert!((low - 75.75).abs() < 0.01 && (high - 100.0).abs() < 1e-9, "{low} {high}");
        assert!(tally(12, 0.0).interval()[0] < 1e-9);
    }
}
