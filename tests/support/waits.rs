//! Waits for the device while a prompt is read. None before its logits, unless a policy's choice is data that the host
//! has to see first: then work is queued behind the wait.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use fastkv::{
    abi,
    engine::{Control, Engine, PrefillOptions},
    kernels::{DType, Device, Error, Launch, Launcher, Matmul, MatrixProduct, TensorMap},
    model::ModelDir,
    policy::{
        AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, HeadKv, Policy, PyramidInfer, PyramidKv, Random,
        Saliency, SnapKv, Steering, StreamingLlm,
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
        (Policy::FastKv(FastKv { retention: tokens(20), propagation: tokens(50), ..FastKv::constant() }), 0),
        (Policy::SnapKv(SnapKv { saliency, retention }), 0),
        (Policy::HeadKv(HeadKv { saliency, retention, heads, ..HeadKv::default() }), 0),
        (Policy::PyramidKv(PyramidKv { saliency, retention, ..PyramidKv::default() }), 0),
        (Policy::H2o(H2o { window: 4, retention }), 0),
        (Policy::PyramidInfer(PyramidInfer::default()), 0),
        (Policy::StreamingLlm(StreamingLlm { retention, ..StreamingLlm::default() }), 0),
        (Policy::Random(Random { retention, ..Random::default() }), 0),
        (Policy::AdaKv(AdaKv { saliency, retention, ..AdaKv::default() }), 0),
        (Policy::GemFilter(GemFilter { retention, ..GemFilter::default() }), 0),
        // What is let go of before the next layer is read: all scores and those from near by come, a list goes.
        (Policy::FastGen(FastGen::default()), 3 * LAYERS),
    ];
    let steering = Steering { spans: vec![2..4, 8..9], heads: vec![(0, 1)], alpha: 0.1 };
    // GemFilter's second pass has the highlighted tokens elsewhere.
    let steered = cases.iter().map(|(policy, early)| match policy {
        Policy::GemFilter(_) => (policy, 1),
        _ => (policy, *early),
    });
    let plan = |policy: &Policy| policy.plan(engine.shape(), TOKENS).map_err(|error| error.to_string());
    let plain = cases.iter().map(|(policy, early)| Ok((policy, plan(policy)?, *early)));
    let steered = steered.map(|(policy, early)| {
        let plan = plan(policy)?.steer(steering.clone()).map_err(|error| error.to_string())?;
        Ok((policy, plan, early))
    });
    for case in plain.chain(steered) {
        let (policy, plan, early) = case.map_err(|error: String| error)?;
        let name = format!("{}, steered: {}", policy.name(), plan.steering.is_some());
        waits.all.set(0);
        waits.early.set(0);
        waits.launched.set(false);
        engine
            .prefill(&ids, &plan, &PrefillOptions::default(), &Control::default())
            .map_err(|error| format!("{name}: {error}"))?;
        if waits.early.get() != early || waits.all.get() == early {
            return Err(format!("{name}: {waits:?} where {early} are to be early"));
        }
    }
    Ok(())
}
