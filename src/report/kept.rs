//! What a policy kept, from a file that `fastkv inspect` wrote.

use super::accuracy::name_of;
use super::picture::{KeptPicture, describe};
use super::results::Inspection;
use super::section::{Figure, NONE, Section, Table, strings};
use crate::engine::{Bytes, LayerTrace, Trace};
use crate::messages::count;

impl Inspection {
    pub(super) fn section(&self, file: &str) -> Section {
        let title = describe(&self.plan.policy);
        let [kept, full, peak] = [self.kv_kept_bytes, self.kv_full_bytes, self.kv_peak_bytes].map(Bytes);
        let share = 100.0 * self.kv_kept_bytes as f64 / self.kv_full_bytes as f64;
        let cache = format!("KV cache {kept} of {full} ({share:.1} %), peak {peak}");
        let tokens = count(self.prompt_tokens, "token");
        let picture = KeptPicture {
            title: &title,
            subtitle: &format!("{}, {tokens}; {cache}", name_of(&self.model)),
            prompt_tokens: self.prompt_tokens,
            trace: &self.trace(),
        };
        let facts = [
            ("model", self.model.clone()),
            ("device", self.device.clone()),
            ("policy", format!("{}: {title}", self.policy)),
            ("prompt", tokens),
            ("cache", cache),
        ];
        Section {
            title: format!("Kept tokens: {file}"),
            facts: facts.map(|(name, value)| (name.to_owned(), value)).into(),
            notes: Vec::new(),
            figures: vec![Figure { name: "kept".to_owned(), svg: picture.svg() }],
            tables: vec![self.table()],
        }
    }

    fn trace(&self) -> Trace {
        let layer = |layer: usize| LayerTrace {
            rows: self.rows[layer],
            kept: self.kept[layer].clone(),
            mass: self.mass[layer].clone(),
            propagated: self.propagated[layer].clone(),
            sets: None,
        };
        Trace { layers: (0..self.rows.len()).map(layer).collect(), restarted: None, ..Trace::default() }
    }

    fn table(&self) -> Table {
        let list = |items: Vec<String>| items.join(" ");
        let row = |layer: usize| {
            vec![
                layer.to_string(),
                self.rows[layer].to_string(),
                list(strings(self.kept[layer].iter().map(Vec::len))),
                list(self.mass[layer].iter().map(|mass| format!("{mass:.3}")).collect()),
                self.propagated[layer].as_ref().map_or(NONE.to_owned(), |on| on.len().to_string()),
            ]
        };
        Table {
            caption: "Layers".to_owned(),
            header: strings(["layer", "reads", "kept per kv head", "mass per kv head", "go on"]),
            rows: (0..self.rows.len()).map(row).collect(),
            words: 0,
        }
    }
}
