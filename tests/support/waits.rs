//! Waits for the device while a prompt is read: one, for its logits, unless a policy's choice is data that the host has
//! to see.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use fastkv::{
    abi,
    engine::{Control, Engine, PrefillOptions},
    kernels::{DType, Device, Error, Launch, Launcher, Matmul, MatrixProduct, TensorMap},
    model::ModelDir,
    policy::{
        AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, Policy, PyramidInfer, PyramidKv, Random, Saliency,
        SnapKv, Steering, StreamingLlm,
    },
};

use super::{
    Check,
    backend::{cuda, model},
    forward::forward,
    tiny::{Rng, Stored, Tiny},
};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![Check::portable("waits_of_prefill", prefill)]
}

/// A device that counts the calls that wait for it.
#[derive(Clone, Debug)]
struct Counting<D> {
    device: D,
    waits: Rc<Cell<usize>>,
}

impl<D> Counting<D> {
    fn count(&self, _call: &'static str) -> Result<(), Error> {
        self.waits.set(self.waits.get() + 1);
        Ok(())
    }
}

impl<D: Device> Launcher for Counting<D> {
    forward! { device: fill launch tensor_map compute_capability multiprocessors }
}

impl<D: Device> Device for Counting<D> {
    type Event = D::Event;

    forward! { device after count: download synchronize elapsed_ms }
    forward! { device: alloc free upload copy record free_memory }
}

impl<D: MatrixProduct> MatrixProduct for Counting<D> {
    forward! { device: matmul_workspace matmul }
}

const LAYERS: usize = 4;
const TOKENS: usize = 90;

fn prefill<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let directory = Tiny { layers: LAYERS, ..model(Stored::Bf16) }.write();
    let opened = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let waits = Rc::default();
    let counting = Counting { device: device.clone(), waits: Rc::clone(&waits) };
    let backend = cuda(&counting, DType::BF16)?.with_chunk_rows(64);
    let engine = Engine::load(backend, &opened).map_err(|error| error.to_string())?;
    let ids = Rng::new(seed).ids(TOKENS, 72);
    let saliency = Saliency { window: 4, ..SnapKv::default().saliency };
    let retention = Budget::Rate(0.3);
    let cases = [
        (Policy::Full, 0),
        (
            Policy::FastKv(FastKv {
                saliency,
                retention,
                propagation: Budget::Rate(0.5),
                ..FastKv::proportional()
            }),
            0,
        ),
        (Policy::SnapKv(SnapKv { saliency, retention }), 0),
        (Policy::PyramidKv(PyramidKv { saliency, retention, ..PyramidKv::default() }), 0),
        (Policy::H2o(H2o { window: 4, retention }), 0),
        (Policy::PyramidInfer(PyramidInfer::default()), 0),
        (Policy::StreamingLlm(StreamingLlm { retention, ..StreamingLlm::default() }), 0),
        (Policy::Random(Random { retention, ..Random::default() }), 0),
        // How many entries each head gets.
        (Policy::AdaKv(AdaKv { saliency, retention, ..AdaKv::default() }), LAYERS),
        // Which tokens are read anew.
        (Policy::GemFilter(GemFilter { retention, ..GemFilter::default() }), 1),
        // All scores and those from near by, of one kv head each.
        (Policy::FastGen(FastGen::default()), 2 * LAYERS),
    ];
    let steering = Steering { spans: vec![2..4, 8..9], heads: vec![(0, 1)], alpha: 0.1 };
    // What was kept by score, to which the highlighted tokens are added; where the rows stand, once they are fewer.
    let steered = [(Policy::Full, 0), (cases[1].0.clone(), LAYERS + 1)];
    let plan = |policy: &Policy| policy.plan(engine.shape(), TOKENS).map_err(|error| error.to_string());
    let plain = cases.iter().map(|(policy, more)| Ok((policy, plan(policy)?, more)));
    let steered = steered.iter().map(|(policy, more)| {
        let plan = plan(policy)?.steer(steering.clone()).map_err(|error| error.to_string())?;
        Ok((policy, plan, more))
    });
    for case in plain.chain(steered) {
        let (policy, plan, more) = case.map_err(|error: String| error)?;
        let name = format!("{}, steered: {}", policy.name(), plan.steering.is_some());
        waits.set(0);
        engine
            .prefill(&ids, &plan, &PrefillOptions::default(), &Control::default())
            .map_err(|error| format!("{name}: {error}"))?;
        if waits.get() != 1 + more {
            return Err(format!("{name}: it waits {} times, not {}", waits.get(), 1 + more));
        }
    }
    Ok(())
}
