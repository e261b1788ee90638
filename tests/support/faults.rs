//! Faults of a device: memory that runs out, launches that fail, a device that is lost. Whatever fails and
//! whenever it does, there is an error that says so, all memory goes back, and unless the device is lost
//! the same engine, and even the same cache, works on.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use fastkv::{
    abi,
    backend::cuda::CudaBackend,
    engine::{Control, Engine, EngineError, GenerationOptions, PrefillOptions, Prompt, Turn},
    kernels::{DType, Device, Error, Graph, Launch, Launcher, Matmul, MatrixProduct, TensorMap},
    model::ModelDir,
    policy::{AdaKv, Budget, FastKv, H2o, Plan, Policy, PolicyError, Saliency, Steering, Tsp},
};

use super::{
    Check,
    forward::forward,
    tiny::{Stored, Tiny},
};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![
        Check::portable("faults_of_memory", |device, seed| faults(device, seed, Fault::Memory, alone)),
        Check::portable("faults_of_launches", |device, seed| faults(device, seed, Fault::Launch, alone)),
        Check::portable("faults_of_lost_devices", |device, seed| faults(device, seed, Fault::Lost, alone)),
        Check::portable("faults_twice", |device, seed| faults(device, seed, Fault::Twice, alone)),
        Check::portable("faults_while_loading", loading),
        Check::portable("faults_of_memory_in_batches", |device, seed| {
            faults(device, seed, Fault::Memory, together)
        }),
        Check::portable("faults_of_launches_in_batches", |device, seed| {
            faults(device, seed, Fault::Launch, together)
        }),
        Check::portable("faults_of_lost_devices_in_batches", |device, seed| {
            faults(device, seed, Fault::Lost, together)
        }),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// One block cannot be had.
    Memory,
    /// One kernel is not launched.
    Launch,
    /// From one call on, every call fails.
    Lost,
    /// Two calls, one behind the other: a failure cannot be made up for at once.
    Twice,
}

/// A device with a fault to come. Clones are the same device.
#[derive(Clone, Debug)]
struct Faulty<D> {
    device: D,
    state: Rc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What is to fail, and how many calls of its kind go well before.
    fault: Cell<Option<(Fault, usize)>>,
    /// Calls that the last fault that was set would have counted.
    calls: Cell<usize>,
    /// Blocks that were not given back.
    live: Cell<usize>,
    /// Whether something failed while it was captured.
    captures: Cell<bool>,
}

impl<D> Faulty<D> {
    fn new(device: D) -> Self {
        Self { device, state: Rc::default() }
    }

    /// Fails the call of that number, of those that the fault concerns; `usize::MAX`: none, they are counted.
    fn fail(&self, fault: Fault, at: usize) {
        self.state.calls.set(0);
        self.state.fault.set(Some((fault, at)));
    }

    /// Forgets the fault and says how many calls it concerned.
    fn heal(&self) -> usize {
        self.state.fault.set(None);
        self.state.calls.get()
    }

    /// Whether a call of this kind is to fail.
    fn fails(&self, call: &'static str) -> bool {
        let Some((fault, at)) = self.state.fault.get() else { return false };
        let calls = self.state.calls.get();
        let concerned = match fault {
            Fault::Memory => call == "alloc",
            Fault::Launch => call == "launch",
            // Nobody can be told that a block does not go back.
            Fault::Lost if call == "free" => return calls > at,
            Fault::Twice => call != "free",
            Fault::Lost => true,
        };
        self.state.calls.set(calls + usize::from(concerned));
        concerned
            && match fault {
                Fault::Lost => calls >= at,
                Fault::Twice => calls >= at && calls - at < 2,
                Fault::Memory | Fault::Launch => calls == at,
            }
    }

    fn before(&self, operation: &'static str) -> Result<(), Error> {
        match self.fails(operation) {
            true => Err(Error::Driver { operation, code: ILLEGAL_ADDRESS }),
            false => Ok(()),
        }
    }

    /// Whether one call was not all that fails.
    fn fails_more(&self) -> bool {
        matches!(self.state.fault.get(), Some((Fault::Lost | Fault::Twice, _)))
    }

    fn is_lost(&self) -> bool {
        matches!(self.state.fault.get(), Some((Fault::Lost, _)))
    }
}

const OUT_OF_MEMORY: u32 = 2;
/// What every call says once a kernel has gone astray.
const ILLEGAL_ADDRESS: u32 = 700;
const LAUNCH_OUT_OF_RESOURCES: u32 = 701;

impl<D: Device> Launcher for Faulty<D> {
    forward! { device after before: fill tensor_map }

    forward! { device: compute_capability multiprocessors }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        if self.fails("launch") {
            return Err(launch.failed(if self.is_lost() {
                ILLEGAL_ADDRESS
            } else {
                LAUNCH_OUT_OF_RESOURCES
            }));
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(launch) }
    }
}

impl<D: Device> Device for Faulty<D> {
    type Event = D::Event;

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        if self.fails("alloc") {
            let code = if self.is_lost() { ILLEGAL_ADDRESS } else { OUT_OF_MEMORY };
            return Err(Error::Driver { operation: "alloc", code });
        }
        let address = self.device.alloc(bytes)?;
        self.state.live.set(self.state.live.get() + 1);
        Ok(address)
    }

    unsafe fn free(&self, address: u64) -> Result<(), Error> {
        self.state.live.set(self.state.live.get() - 1);
        self.before("free")?;
        // SAFETY: the caller's promise.
        unsafe { self.device.free(address) }
    }

    forward! { device after before: reserve upload download copy synchronize record elapsed_ms }
    forward! { device: free_memory }

    unsafe fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Option<Box<dyn Graph>>, Error> {
        self.before("capture")?;
        // SAFETY: the caller's promise.
        let captured = unsafe { self.device.capture(work) };
        self.state.captures.set(captured.is_err());
        captured
    }
}

impl<D: MatrixProduct> MatrixProduct for Faulty<D> {
    forward! { device after before: matmul_workspace matmul }
}

type Faulted<D> = Engine<CudaBackend<Faulty<D>>>;

/// What an engine is made to do: numbers that are always the same, and a failure that it got over.
type Outcome = Result<(Vec<f32>, Option<EngineError>), EngineError>;

/// Seeds share the calls that fail.
fn faults<D: MatrixProduct + Clone + Debug>(
    device: &D,
    seed: u64,
    fault: Fault,
    work: fn(&Faulted<D>) -> Outcome,
) -> Result<(), String> {
    let directory = tiny().write();
    let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let device = Faulty::new(device.clone());
    {
        let engine = load(&device, &model).map_err(|error| error.to_string())?;
        // The first time something stays, such as the frequencies of rotations.
        let (expected, _) = work(&engine).map_err(|error| error.to_string())?;
        device.fail(fault, usize::MAX);
        work(&engine).map_err(|error| error.to_string())?;
        let calls = device.heal();
        let idle = device.state.live.get();
        // What is lost is lost in the same way everywhere.
        let step = if fault == Fault::Lost { 28 } else { 4 };
        for at in (seed as usize % 4..calls).step_by(step) {
            let failed = |problem: String| format!("call {at} of {calls}: {problem}");
            device.fail(fault, at);
            let outcome = work(&engine);
            let lost = device.is_lost();
            let captures = device.state.captures.take();
            let live = device.state.live.get();
            device.heal();
            let message = match outcome {
                Err(error) => error.to_string(),
                // Behind a step that failed the same step works.
                Ok((logits, Some(error))) if logits == expected => error.to_string(),
                Ok((_, Some(error))) => return Err(failed(format!("{error}, and then other logits"))),
                // What cannot be captured is done as it is.
                Ok((numbers, None)) if captures && numbers == expected => continue,
                Ok((_, None)) => return Err(failed("nothing failed".into())),
            };
            let words: &[&str] = match fault {
                Fault::Memory => &["out of memory", "bytes for"],
                Fault::Launch => {
                    &["launching fastkv_", "701 (LAUNCH_OUT_OF_RESOURCES)", "grid [", "Params {"]
                }
                Fault::Lost => &["700 (ILLEGAL_ADDRESS)"],
                // Whatever it was, but not what came of it.
                Fault::Twice if message != EngineError::LostCache.to_string() => &[],
                Fault::Twice => &["what failed first"],
            };
            if let Some(word) = words.iter().find(|word| !message.contains(**word)) {
                return Err(failed(format!("no \"{word}\" in \"{message}\"")));
            }
            if live != idle {
                return Err(failed(format!("{live} blocks are in use, where {idle} were")));
            }
            // A device that is lost stays so; here it is one that was only said to be.
            if !lost && at % 32 < 4 {
                let (logits, _) = work(&engine).map_err(|error| failed(error.to_string()))?;
                if logits != expected {
                    return Err(failed("other logits afterwards".into()));
                }
            }
        }
    }
    match device.state.live.get() {
        0 => Ok(()),
        live => Err(format!("{live} blocks are in use when all is over")),
    }
}

/// No block of the weights, and no other, can be had.
fn loading<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let directory = tiny().write();
    let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let device = Faulty::new(device.clone());
    device.fail(Fault::Memory, usize::MAX);
    drop(load(&device, &model).map_err(|error| error.to_string())?);
    let calls = device.heal();
    for at in (seed as usize % 4..calls).step_by(4) {
        device.fail(Fault::Memory, at);
        let error = load(&device, &model).err().ok_or("loaded without memory")?.to_string();
        device.heal();
        let live = device.state.live.get();
        if live > 0 || !error.contains("out of memory") {
            return Err(format!("block {at} of {calls}: {error}; {live} blocks are in use"));
        }
    }
    Ok(())
}

fn tiny() -> Tiny {
    Tiny {
        layers: 2,
        hidden: 64,
        intermediate: 64,
        query_heads: 2,
        kv_heads: 1,
        head_dim: 64,
        vocabulary: 24,
        stored: Stored::Bf16,
        ..Tiny::default()
    }
}

fn load<D: MatrixProduct + Clone + Debug>(
    device: &Faulty<D>,
    model: &ModelDir,
) -> Result<Faulted<D>, EngineError> {
    Engine::load(CudaBackend::new(device.clone(), "a faulty device", DType::BF16)?, model)
}

const PROMPT: [u32; 12] = [1, 7, 3, 3, 20, 11, 5, 2, 9, 17, 8, 4];

/// Hands on some of the tokens, keeps some of these, evicts in decoding, and is steered.
fn plan<D: MatrixProduct + Clone + Debug>(engine: &Faulted<D>) -> Result<Plan, PolicyError> {
    let h2o = Tsp::with(Policy::H2o(H2o { window: 3, retention: Budget::Tokens(6) }));
    let saliency = Saliency { window: 3, ..h2o.saliency };
    let tsp = Tsp { saliency, propagation: Budget::Tokens(8), tsp_layer: Some(0), ..h2o };
    let plan = Policy::Tsp(tsp).plan(engine.shape(), PROMPT.len())?;
    plan.steer(Steering { spans: vec![2..4, 8..9], heads: vec![(0, 1), (1, 0)], alpha: 0.1 })
}

/// Logits of a prompt and of a step. A step that fails is tried again, and its failure told: its cache is as it was, or
/// known to be lost where some of it was evicted, or where the device failed again before it was as it had been.
fn alone<D: MatrixProduct + Clone + Debug>(engine: &Faulted<D>) -> Outcome {
    let control = Control::default();
    let plan = plan(engine).expect("a plan of this model");
    let mut prefill = engine.prefill(&PROMPT, &plan, &PrefillOptions::default(), &control)?;
    let mut logits = prefill.logits;
    let mut failure = None;
    logits.extend(match engine.append(&mut prefill.cache, &[3], &control) {
        Err(error) => match engine.append(&mut prefill.cache, &[3], &control) {
            Err(EngineError::LostCache)
                if error.to_string().contains("fastkv_compact") || engine.backend().device().fails_more() =>
            {
                return Err(error);
            }
            again => {
                failure = Some(error);
                again?
            }
        },
        logits => logits?,
    });
    Ok((logits, failure))
}

/// Answers to two prompts that are read and decoded together: steps of heads with lists of one length and of several, the
/// later ones captured.
fn together<D: MatrixProduct + Clone + Debug>(engine: &Faulted<D>) -> Outcome {
    let control = Control::default();
    let (retention, shape) = (Budget::Tokens(6), engine.shape());
    let saliency = Saliency { window: 3, ..AdaKv::default().saliency };
    let even = FastKv { saliency, retention, propagation: Budget::Tokens(8), ..FastKv::proportional() };
    let uneven = AdaKv { saliency, retention, ..AdaKv::default() };
    let readings = [(&PROMPT[..], Policy::FastKv(even)), (&PROMPT[3..], Policy::AdaKv(uneven))];
    let plans = readings.each_ref().map(|(ids, policy)| policy.plan(shape, ids.len()).expect("a plan"));
    let prompts = [0, 1].map(|prompt| Prompt { ids: readings[prompt].0, plan: &plans[prompt] });
    let options = PrefillOptions { slack: 6, ..PrefillOptions::default() };
    let mut prefills = engine.prefill_batch(&prompts, &options, &control)?;
    let options = GenerationOptions { max_tokens: 5, ..GenerationOptions::default() };
    let turns = prefills.iter_mut().map(|prefill| Turn {
        cache: &mut prefill.cache,
        logits: std::mem::take(&mut prefill.logits),
        options: &options,
    });
    let answers = engine.generate_batch(turns.collect(), &control, |_, _| ())?;
    Ok((answers.iter().flat_map(|answer| &answer.tokens).map(|token| *token as f32).collect(), None))
}
