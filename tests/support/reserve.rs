//! Memory that is asked for ahead: what plans say is enough for prompts, alone and together.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use fastkv::{
    abi,
    engine::{Control, Engine, MemoryEstimate, MemoryOptions, PrefillOptions, Prompt},
    kernels::{DType, Device, Error, Launch, Launcher, Matmul, MatrixProduct, TensorMap},
    model::ModelDir,
    policy::{Budget, FastKv, H2o, Plan, Policy, Saliency, SnapKv, Tsp},
};

use super::{
    Check,
    backend::{cuda, model},
    forward::forward,
    tiny::{Rng, Stored, Tiny},
};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![Check::portable("reserve_prompts", prompts)]
}

/// A device that notes how much it is to have ready.
#[derive(Clone, Debug)]
struct Reserving<D> {
    device: D,
    asked: Rc<Cell<Option<usize>>>,
}

impl<D: Device> Launcher for Reserving<D> {
    forward! { device: fill launch tensor_map compute_capability multiprocessors }
}

impl<D: Device> Device for Reserving<D> {
    type Event = D::Event;

    fn reserve(&self, bytes: usize) -> Result<(), Error> {
        assert_eq!(self.asked.replace(Some(bytes)), None, "asked for once");
        self.device.reserve(bytes)
    }

    forward! { device: alloc free upload download copy synchronize record elapsed_ms free_memory }
}

impl<D: MatrixProduct> MatrixProduct for Reserving<D> {
    forward! { device: matmul_workspace matmul }
}

fn prompts<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let tiny = Tiny { layers: 3, ..model(Stored::Bf16) };
    let directory = tiny.write();
    let opened = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let asked = Rc::default();
    let reserving = Reserving { device: device.clone(), asked: Rc::clone(&asked) };
    let backend = cuda(&reserving, DType::BF16)?.with_chunk_rows(64);
    let engine = Engine::load(backend, &opened).map_err(|error| error.to_string())?;
    let saliency = Saliency { window: 4, ..SnapKv::default().saliency };
    let retention = Budget::Rate(0.2);
    let policies = [
        Policy::Full,
        Policy::FastKv(FastKv { saliency, retention, tsp_layer: Some(1), ..FastKv::proportional() }),
        Policy::SnapKv(SnapKv { saliency, retention }),
        Policy::Tsp(Tsp {
            saliency,
            tsp_layer: Some(0),
            ..Tsp::with(Policy::H2o(H2o { window: 4, retention }))
        }),
    ];
    let mut rng = Rng::new(seed);
    let ids = rng.ids(200, 72);
    for policy in policies {
        let plan = |tokens| policy.plan(engine.shape(), tokens).map_err(|error| error.to_string());
        for lengths in [&[200][..], &[90, 200]] {
            let plans: Vec<Plan> = lengths.iter().map(|length| plan(*length)).collect::<Result<_, _>>()?;
            let prompts: Vec<Prompt<'_>> = lengths
                .iter()
                .zip(&plans)
                .map(|(length, plan)| Prompt { ids: &ids[..*length], plan })
                .collect();
            asked.set(None);
            engine.backend().forget_peak();
            let (before, _) = engine.backend().memory();
            let options = PrefillOptions { slack: 7, ..PrefillOptions::default() };
            engine
                .prefill_batch(&prompts, &options, &Control::default())
                .map_err(|error| error.to_string())?;
            let (_, peak) = engine.backend().memory();
            let (taken, asked) = (peak - before, asked.get().ok_or("nothing was asked for")?);
            let memory = MemoryOptions {
                weight_bytes: 0,
                chunk_rows: 64,
                kv_element_bytes: 2,
                windows_at_once: 0,
                more_tokens: 7,
            };
            let all: Vec<&Plan> = plans.iter().collect();
            let told = MemoryEstimate::together(engine.config(), &all, &memory).total();
            if asked as u64 != told || taken > asked || asked > 2 * taken {
                return Err(format!(
                    "{} {lengths:?}: {told} bytes were told, {asked} asked for, {taken} taken",
                    policy.name()
                ));
            }
        }
    }
    Ok(())
}
