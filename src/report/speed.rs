//! What a bench measured: time, speed-up and memory over the length of the context.

use crate::measure::StageSeconds;

use super::accuracy::name_of;
use super::chart::{Axis, Entry, Lines, Panel, Picture, Point, Series};
use super::results::{Bench, BenchSettings, Measured, Skipped};
use super::scale::{Kind, Scale, figures, tokens};
use super::section::{Figure, Section, Styles, Table, or_none, strings};

const GIB: f64 = (1_u64 << 30) as f64;

impl Bench {
    /// TTFT, speed-up and decoding over the length of the context.
    pub fn picture(&self) -> Picture {
        self.speed(&mut Styles::default())
    }

    pub(super) fn section(&self, file: &str, styles: &mut Styles) -> Section {
        let settings = &self.settings;
        let fact = |name: &str, value: String| (name.to_owned(), value);
        let mut facts = vec![
            fact("model", self.subject()),
            fact("device", format!("{} ({})", self.device, self.device_reason)),
            fact("version", self.version.clone()),
            fact("weights", format!("{} GiB", figures(self.weights_bytes as f64 / GIB))),
            fact("batch", settings.batch.to_string()),
            fact("runs", format!("{}, after {} that do not count", settings.repeat, settings.warm_up)),
            fact("tokens decoded", settings.decode_tokens.to_string()),
            fact("exact shortcuts", settings.exact_shortcuts.to_string()),
            fact("seed", settings.seed.to_string()),
        ];
        facts.retain(|(_, value)| !value.is_empty());
        let mut notes = Vec::new();
        if self.cancelled {
            notes.push("The run was stopped; this is what was measured by then.".to_owned());
        }
        let mut figures = Vec::new();
        if !self.measured.is_empty() {
            figures.push(Figure { name: "speed".to_owned(), svg: self.speed(styles).svg() });
            figures.push(Figure { name: "memory".to_owned(), svg: self.memory(styles).svg() });
        }
        let mut tables = vec![self.table(), self.stages_table(), self.skipped_table(), self.options_table()];
        tables.retain(|table| !table.rows.is_empty());
        Section { title: format!("Speed and memory: {file}"), facts, notes, figures, tables }
    }

    /// The model, or the shape of random weights.
    fn subject(&self) -> String {
        match (&self.model, &self.shape) {
            (Some(model), _) => name_of(model),
            (None, Some(shape)) => format!("{shape}, random weights"),
            (None, None) => "unnamed".to_owned(),
        }
    }

    fn subtitle(&self) -> String {
        let BenchSettings { batch, repeat, .. } = &self.settings;
        format!(
            "{}; {}; batch {batch}; medians of {repeat}, bars from least to most",
            self.subject(),
            self.device
        )
    }

    fn speed(&self, styles: &mut Styles) -> Picture {
        let ttft = self.panel("Time to first token, s", Kind::Log, styles, |row| {
            Some((row.ttft_s, range(&row.ttft_runs_s)))
        });
        let mut speed_up = self
            .panel("Speed-up over full context", Kind::Linear, styles, |row| Some((row.ttft_speedup?, None)));
        let has_speed_up = speed_up.series.iter().any(|series| !series.points.is_empty());
        let mut legend = self.legend(styles);
        if has_speed_up {
            let bounds = self.panel("", Kind::Linear, styles, |row| Some((row.flop_bound, None)));
            let bounds = bounds.series.into_iter().map(|series| Series {
                name: format!("{}, bound by FLOP", series.name),
                dashed: true,
                ..series
            });
            speed_up.series.extend(bounds);
            speed_up.y.scale = scale(Kind::Linear, &speed_up.series);
            legend.push(Entry { style: 0, dashed: true, name: "bound by FLOP".to_owned() });
        }
        let decode = self.panel("Decoding, tokens/s", Kind::Linear, styles, |row| {
            Some((row.decode_tokens_per_s?, range(&row.decode_runs_tokens_per_s)))
        });
        self.picture_of(
            "Time to first token over the length of the context",
            legend,
            [ttft, speed_up, decode],
        )
    }

    fn memory(&self, styles: &mut Styles) -> Picture {
        let gib = |bytes: u64| Some((bytes as f64 / GIB, None));
        let panels = [
            self.panel("KV cache at its most, GiB", Kind::Log, styles, |row| gib(row.kv_peak_bytes)),
            self.panel("KV cache kept, GiB", Kind::Log, styles, |row| gib(row.kv_kept_bytes)),
            self.panel("Device memory at its most, GiB", Kind::Linear, styles, |row| {
                gib(row.memory_peak_bytes?)
            }),
        ];
        self.picture_of("Memory over the length of the context", self.legend(styles), panels)
    }

    /// The panels that have something to show.
    fn picture_of<const N: usize>(&self, title: &str, legend: Vec<Entry>, panels: [Lines; N]) -> Picture {
        let shows = |panel: &Lines| panel.series.iter().any(|series| !series.points.is_empty());
        Picture {
            title: title.to_owned(),
            subtitle: self.subtitle(),
            legend,
            panels: panels.into_iter().filter(shows).map(Panel::Lines).collect(),
        }
    }

    fn panel(
        &self,
        title: &str,
        kind: Kind,
        styles: &mut Styles,
        value: impl Fn(&Measured) -> Option<(f64, Option<[f64; 2]>)>,
    ) -> Lines {
        let mut series: Vec<Series> = Vec::new();
        for row in &self.measured {
            let index = series.iter().position(|series| series.name == row.policy).unwrap_or_else(|| {
                let (name, style) = (row.policy.clone(), styles.of(&row.policy));
                series.push(Series { name, style, dashed: false, points: Vec::new() });
                series.len() - 1
            });
            if let Some((y, range)) = value(row) {
                series[index].points.push(Point { x: row.tokens as f64, y, range });
            }
        }
        series.iter_mut().for_each(|series| series.points.sort_by(|a, b| a.x.total_cmp(&b.x)));
        let lengths = self.measured.iter().map(|row| row.tokens as f64);
        Lines {
            title: title.to_owned(),
            x: Axis { label: "tokens".to_owned(), scale: Scale::of_lengths(lengths), spell: tokens },
            y: Axis { label: title.to_owned(), scale: scale(kind, &series), spell: figures },
            series,
        }
    }

    fn legend(&self, styles: &mut Styles) -> Vec<Entry> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.measured {
            if !names.contains(&row.policy.as_str()) {
                names.push(&row.policy);
            }
        }
        names
            .iter()
            .map(|name| Entry { style: styles.of(name), dashed: false, name: (*name).to_owned() })
            .collect()
    }

    fn table(&self) -> Table {
        let header = [
            "policy",
            "tokens",
            "runs",
            "TTFT, s",
            "least–most",
            "speed-up",
            "bound",
            "TFLOP",
            "decode, tokens/s",
            "least–most",
            "KV kept, GiB",
            "of full, %",
            "KV peak, GiB",
            "device, GiB",
        ];
        let spread =
            |values: &[f64]| range(values).map(|[low, high]| format!("{}–{}", figures(low), figures(high)));
        let gib = |bytes: u64| figures(bytes as f64 / GIB);
        let row = |row: &Measured| {
            vec![
                row.policy.clone(),
                tokens(row.tokens as f64),
                row.ttft_runs_s.len().to_string(),
                figures(row.ttft_s),
                or_none(spread(&row.ttft_runs_s)),
                or_none(row.ttft_speedup.map(|ratio| format!("{ratio:.2}"))),
                format!("{:.2}", row.flop_bound),
                figures(row.flops / 1e12),
                or_none(row.decode_tokens_per_s.map(figures)),
                or_none(spread(&row.decode_runs_tokens_per_s)),
                gib(row.kv_kept_bytes),
                format!("{:.1}", 100.0 * row.kv_kept_bytes as f64 / row.kv_full_bytes as f64),
                gib(row.kv_peak_bytes),
                or_none(row.memory_peak_bytes.map(gib)),
            ]
        };
        Table {
            caption: "What was measured: medians, and the least and the most of the runs".to_owned(),
            header: strings(header),
            rows: self.measured.iter().map(row).collect(),
            words: 1,
        }
    }

    fn stages_table(&self) -> Table {
        let names = StageSeconds::default().named().map(|(name, _)| name);
        let row = |row: &Measured| {
            let seconds = row.stages_s?.named().map(|(_, seconds)| figures(seconds));
            let first = [row.policy.clone(), tokens(row.tokens as f64)];
            Some(first.into_iter().chain(seconds).collect())
        };
        Table {
            caption: "Seconds of a prefill by stage, of the last run".to_owned(),
            header: strings(["policy", "tokens"].into_iter().chain(names)),
            rows: self.measured.iter().filter_map(row).collect(),
            words: 1,
        }
    }

    fn skipped_table(&self) -> Table {
        let row = |row: &Skipped| vec![row.policy.clone(), tokens(row.tokens as f64), row.reason.clone()];
        Table {
            caption: "Not measured".to_owned(),
            header: strings(["policy", "tokens", "why"]),
            rows: self.skipped.iter().map(row).collect(),
            words: 3,
        }
    }

    fn options_table(&self) -> Table {
        let mut rows: Vec<Vec<String>> = Vec::new();
        for row in &self.measured {
            let cells = vec![row.policy.clone(), row.options.to_string()];
            if !rows.contains(&cells) {
                rows.push(cells);
            }
        }
        let caption = "Policies and their options".to_owned();
        Table { caption, header: strings(["policy", "options"]), rows, words: 2 }
    }
}

fn range(values: &[f64]) -> Option<[f64; 2]> {
    let low = values.iter().copied().reduce(f64::min)?;
    Some([low, values.iter().copied().fold(low, f64::max)])
}

/// An axis that has room for the points and their bars.
fn scale(kind: Kind, series: &[Series]) -> Scale {
    let points = series.iter().flat_map(|series| &series.points);
    Scale::new(kind, points.flat_map(|point| [point.y].into_iter().chain(point.range.into_iter().flatten())))
}
