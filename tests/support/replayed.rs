//! A device that queues every launch and every memory set from a graph, which it captures: what a driver does can stand
//! in an engine's own graphs.

use fastkv::{
    abi,
    kernels::{Device, Error, Launch, Launcher, TensorMap},
};

use super::{
    Check, attention, decode, forward::forward, gather, llama, pooling, scores, select, share, sums,
};

struct Replayed<'a, D> {
    device: &'a D,
}

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("drivers_in_graphs", |device, seed| run(device, seed, &PORTABLE, false)),
        Check::hopper("drivers_in_graphs", |device, seed| run(device, seed, &HOPPER, true)),
    ]
}

/// A check of every driver.
const PORTABLE: [&str; 23] = [
    "add",
    "add_scores",
    "column_sums_random",
    "compact_random",
    "convert",
    "decode_random",
    "embed",
    "gather_indices",
    "gather_kv_random",
    "gather_rows_random",
    "gather_scores",
    "mark_keys",
    "pool_scores",
    "prefill_attention_scores",
    "raise_scores",
    "rms_norm_random",
    "rope_random",
    "sample_random",
    "select_block_random",
    "select_grid_random",
    "share_keys",
    "silu_mul",
    "window_scores_random",
];
const HOPPER: [&str; 2] = ["select_cluster_random", "sm90_attention_scores"];

fn run<D: Device>(device: &D, seed: u64, names: &[&str], hopper: bool) -> Result<(), String> {
    let replayed = Replayed { device };
    let families: [Vec<Check<Replayed<'_, D>>>; 9] = [
        attention::checks(),
        decode::checks(),
        gather::checks(),
        llama::checks(),
        pooling::checks(),
        scores::checks(),
        select::checks(),
        share::checks(),
        sums::checks(),
    ];
    let mut left = names.to_vec();
    for check in families.into_iter().flatten().filter(|check| check.hopper == hopper) {
        if left.contains(&check.name) {
            left.retain(|name| *name != check.name);
            (check.run)(&replayed, seed).map_err(|error| format!("{}: {error}", check.name))?;
        }
    }
    match left.is_empty() {
        true => Ok(()),
        false => Err(format!("there are no checks {left:?}")),
    }
}

impl<D: Device> Replayed<'_, D> {
    fn replay(&self, mut work: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
        // SAFETY: the memory of what is captured outlives the graph, which is launched at once.
        match unsafe { self.device.capture(&mut work) }? {
            // SAFETY: as above.
            Some(graph) => unsafe { graph.launch() },
            None => work(),
        }
    }
}

impl<D: Device> Launcher for Replayed<'_, D> {
    forward! { device: tensor_map compute_capability multiprocessors }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise, here and below.
        self.replay(|| unsafe { self.device.fill(to, value, bytes) })
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        // SAFETY: as above.
        self.replay(|| unsafe { self.device.launch(launch) })
    }
}

impl<D: Device> Device for Replayed<'_, D> {
    type Event = D::Event;

    forward! { device: alloc free upload download copy synchronize record elapsed_ms }
}
