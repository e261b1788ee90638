//! Waits for the device while a prompt is read. None before its logits, unless a policy's choice is data that the host
//! has to see first: then work is queued behind the wait.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use fastkv::{
    abi,
    engine::{Control, Engine, PrefillOptions, Prompt},
    kernels::{DType, Device, Error, Launch, Launcher, Matmul, MatrixProduct, TensorMap},
    model::ModelDir,
    policy::{
        AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, HeadKv, Policy, PyramidInfer, PyramidKv, Random,
        Saliency, SnapKv, Steering, StreamingLlm, Tsp,
    },
};

use super::{
    Check,
    backend::{cuda, head_scores, model},
    forward::forward,
    tiny::{Rng, Stored, Tiny},
};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![Check::portable("waits_of_prefill", prefill)]
}

/// A device that counts the calls that wait for it, or may: a driver stages more than a little before it returns, and
/// may wait for the stream until it does.
#[derive(Clone, Debug)]
struct Counting<D> {
    device: D,
    waits: Rc<Waits>,
}

#[derive(Debug, Default)]
struct Waits {
    all: Cell<usize>,
    /// Those that something was queued behind.
    early: Cell<usize>,
    /// Whether something is queued at all.
    launched: Cell<bool>,
}

impl<D> Counting<D> {
    fn wait(&self, _call: &'static str) -> Result<(), Error> {
        self.waits.all.set(self.waits.all.get() + 1);
        Ok(())
    }

    fn queue(&self, _call: &'static str) -> Result<(), Error> {
        self.waits.early.set(self.waits.all.get());
        self.waits.launched.set(true);
        Ok(())
    }
}

impl<D: Device> Launcher for Counting<D> {
    forward! { device after queue: fill launch }
    forward! { device: tensor_map compute_capability multiprocessors }
}

impl<D: Device> Device for Counting<D> {
    type Event = D::Event;

    forward! { device after wait: download synchronize elapsed_ms }
    forward! { device after queue: copy }
    forward! { device: alloc free record free_memory }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        if self.waits.launched.get() && from.len() > LITTLE {
            self.wait("upload")?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.upload(to, from) }
    }
}

impl<D: MatrixProduct> MatrixProduct for Counting<D> {
    forward! { device after queue: matmul }
    forward! { device: matmul_workspace }
}

const LAYERS: usize = 4;
const TOKENS: usize = 90;
/// Bytes that are a number for each head, or a bit for each token, but no number for each of the tokens kept.
const LITTLE: usize = 64;

fn prefill<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let directory = Tiny { layers: LAYERS, ..model(Stored::Bf16) }.write();
    let opened = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let waits = Rc::<Waits>::default();
    let counting = Counting { device: device.clone(), waits: Rc::clone(&waits) };
    let backend = cuda(&counting, DType::BF16)?.with_chunk_rows(64);
    let engine = Engine::load(backend, &opened).map_err(|error| error.to_string())?;
    let ids = Rng::new(seed).ids(TOKENS, 72);
    let saliency = Saliency { window: 4, ..SnapKv::default().saliency };
    let retention = Budget::Rate(0.3);
    let tokens = Budget::Tokens;
    let heads = head_scores(engine.shape());
    const NONE: [usize; 2] = [0; 2];
    let streaming = Policy::StreamingLlm(StreamingLlm { retention, ..StreamingLlm::default() });
    // How often each waits, and how often when it is steered.
    let cases = [
        (Policy::Full, NONE),
        (
            Policy::FastKv(FastKv {
                saliency,
                retention,
                propagation: Budget::Rate(0.5),
                ..FastKv::proportional()
            }),
            NONE,
        ),
        (
            Policy::FastKv(FastKv { retention: tokens(20), propagation: tokens(50), ..FastKv::constant() }),
            NONE,
        ),
        (Policy::SnapKv(SnapKv { saliency, retention }), NONE),
        (Policy::HeadKv(HeadKv { saliency, retention, heads, ..HeadKv::default() }), NONE),
        (Policy::PyramidKv(PyramidKv { saliency, retention, ..PyramidKv::default() }), NONE),
        (Policy::H2o(H2o { window: 4, retention }), NONE),
        (Policy::PyramidInfer(PyramidInfer::default()), NONE),
        (streaming.clone(), NONE),
        (Policy::Random(Random { retention, ..Random::default() }), NONE),
        (Policy::AdaKv(AdaKv { saliency, retention, ..AdaKv::default() }), NONE),
        // The second pass has the highlighted tokens elsewhere.
        (Policy::GemFilter(GemFilter { retention, ..GemFilter::default() }), [0, 1]),
        // So have the two layers behind the TSP layer, and rows that are named by their place need them.
        (
            Policy::Tsp(Tsp {
                tsp_layer: Some(1),
                propagation: Budget::Rate(0.5),
                ..Tsp::with(streaming.clone())
            }),
            [0, 1 + 2],
        ),
        // What is let go of before the next layer is read: all scores and those from near by come, a list goes.
        (Policy::FastGen(FastGen::default()), [3 * LAYERS; 2]),
    ];
    let steering = Steering { spans: vec![2..4, 8..9], heads: vec![(0, 1)], alpha: 0.1 };
    let plan = |policy: &Policy| policy.plan(engine.shape(), TOKENS).map_err(|error| error.to_string());
    let plain = cases.iter().map(|(policy, [early, _])| Ok((policy, plan(policy)?, *early)));
    let steered = cases.iter().map(|(policy, [_, early])| {
        let plan = plan(policy)?.steer(steering.clone()).map_err(|error| error.to_string())?;
        Ok((policy, plan, *early))
    });
    let begin = || {
        waits.all.set(0);
        waits.early.set(0);
        waits.launched.set(false);
    };
    for case in plain.chain(steered) {
        let (policy, plan, early) = case.map_err(|error: String| error)?;
        let name = format!("{}, steered: {}", policy.name(), plan.steering.is_some());
        begin();
        engine
            .prefill(&ids, &plan, &PrefillOptions::default(), &Control::default())
            .map_err(|error| format!("{name}: {error}"))?;
        if waits.early.get() != early || waits.all.get() == early {
            return Err(format!("{name}: {waits:?} where {early} are to be early"));
        }
    }
    // Prompts that are read together: the lists of the last are there before the first is looked at.
    let plans = [plan(&streaming)?, plan(&cases[1].0)?];
    let prompts = plans.each_ref().map(|plan| Prompt { ids: &ids, plan });
    begin();
    engine
        .prefill_batch(&prompts, &PrefillOptions::default(), &Control::default())
        .map_err(|error| format!("together: {error}"))?;
    match waits.early.get() {
        0 => Ok(()),
        _ => Err(format!("together: {waits:?}")),
    }
}
