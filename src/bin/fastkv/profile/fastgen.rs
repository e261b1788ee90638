//! `fastkv profile fastgen`.

use anyhow::Result;
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Control, Engine, PrefillOptions, Trace};
use fastkv::model::ModelDir;
use fastkv::policy::{ModelShape, Plan};

use crate::device::on;
use crate::input::PromptOptions;
use crate::loading::ModelOptions;
use crate::options::{PolicyName, PolicyOptions};
use crate::output;

/// Show the set of tokens that FastGen gives each head of a prompt, and the attention each set recovers.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    #[command(flatten)]
    prompt: PromptOptions,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    policy_options: PolicyOptions,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let mut policies = arguments.policy_options.policies(&[PolicyName::Fastgen])?;
    let model = ModelDir::open(&arguments.model.model)?;
    let prompt = arguments.prompt.read(&model, None)?;
    arguments.policy_options.complete(&mut policies, &model)?;
    let plan = policies[0].plan(ModelShape::from(&model.config), prompt.ids.len())?;
    let (backend, _) = arguments.model.backend(&model)?;
    on!(backend, backend => {
        let engine = arguments.model.load(&model, backend, [&plan], 0, arguments.json, cancel)?;
        show_sets(arguments, &engine, &prompt.ids, &plan, cancel)
    })
}

fn show_sets<B: Backend>(
    arguments: &Arguments,
    engine: &Engine<B>,
    ids: &[u32],
    plan: &Plan,
    cancel: &Cancel,
) -> Result<()> {
    let control = Control { cancel: Some(cancel), progress: None };
    let options = PrefillOptions { trace: true, ..Default::default() };
    let prefill = engine.prefill(ids, plan, &options, &control)?;
    let share = prefill.cache.bytes(engine.backend()) as f64
        / plan.kept_kv_bytes(engine.backend().kv_element_bytes()) as f64;
    let trace = prefill.trace.unwrap_or_default();
    if arguments.json {
        return output::print(&output::json(&trace)?);
    }
    let text = format!("{}\nthe cache is {:.1} % of the full one\n", sets(&trace), 100.0 * share);
    output::print(text.as_bytes())
}

fn sets(trace: &Trace) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "layer",
        "kv head",
        "set",
        "kept",
        "special",
        "+ punctuation",
        "+ frequent",
        "+ local",
    ]);
    for (layer, rules) in trace.layers.iter().enumerate() {
        for (head, set) in rules.sets.iter().flatten().enumerate() {
            let cells = [
                layer.to_string(),
                head.to_string(),
                format!("{:?}", set.set).to_lowercase(),
                format!("{} of {}", rules.kept[head].len(), rules.rows),
            ];
            table.add_row(cells.into_iter().chain(set.recovered.map(|recovered| format!("{recovered:.3}"))));
        }
    }
    table
}
