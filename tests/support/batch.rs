//! Sequences that decode together on the CUDA backend: steps that are captured and queued again, against the CPU
//! backend and against steps that are not.

use std::cell::Cell;
use std::fmt::Debug;
use std::rc::Rc;

use fastkv::abi;
use fastkv::backend::{Backend, BackendError, Visible};
use fastkv::cache::Cache;
use fastkv::engine::{
    Control, Engine, EngineError, GenerationOptions, Prefill, PrefillOptions, Prompt, Turn,
};
use fastkv::kernels::{Device, Error, Launch, Launcher, Matmul, MatrixProduct, TensorMap};
use fastkv::model::ModelDir;
use fastkv::policy::{AdaKv, Budget, FastKv, Plan, Policy, SnapKv};

use super::Check;
use super::backend::{Output, Scene, Sizes, TYPES, activations_error, compare, cpu, cuda, flat, model, near};
use super::forward::forward;
use super::tiny::{Rng, Tiny};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![
        Check::portable("batch_steps", steps),
        Check::portable("batch_steps_clear_nothing", steps_clear_nothing),
        Check::hopper("batch_models", models),
        Check::portable("batch_steps_without_room", steps_without_room),
        Check::portable("batch_bad_operands", bad_operands),
    ]
}

/// Steps of three sequences of ragged heads, the later ones captured.
fn steps<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let (dtype, stored, unit) = TYPES[seed as usize % 2];
    let sizes = Sizes { group: 2, heads: 2, head_dim: 64, rows: 5, keys: 150 };
    let scene = Scene { sizes, stored, unit, seed };
    let run = |error: BackendError| error.to_string();
    let keys = sizes.keys;
    // A head without entries; one of more than a chunk; heads of one length, and other tokens. Then one sequence,
    // which stays where it is.
    let several = [[0, 7], [keys - 1, 70], [70, 70]];
    for kept in [&several[..], &[[5, 70]]] {
        let (found, calls, recording) = several_steps(&scene, &cuda(device, dtype)?, kept).map_err(run)?;
        if calls != 2 {
            return Err(format!("{STEPS} steps were put together {calls} times, not 2: {recording}"));
        }
        let (expected, ..) = several_steps(&scene, &cpu()?, kept).map_err(run)?;
        found.iter().zip(&expected).try_for_each(|(found, expected)| compare(found, expected))?;
    }
    Ok(())
}

/// A device that counts how often it is told to set bytes.
#[derive(Clone, Debug)]
struct Clearing<D> {
    device: D,
    fills: Rc<Cell<usize>>,
}

impl<D> Clearing<D> {
    fn count(&self, _call: &'static str) -> Result<(), Error> {
        self.fills.set(self.fills.get() + 1);
        Ok(())
    }
}

impl<D: Device> Launcher for Clearing<D> {
    forward! { device after count: fill }
    forward! { device: launch tensor_map compute_capability multiprocessors }
}

impl<D: Device> Device for Clearing<D> {
    type Event = D::Event;

    forward! { device: alloc free upload download copy synchronize record elapsed_ms free_memory }
}

impl<D: MatrixProduct> MatrixProduct for Clearing<D> {
    forward! { device: matmul matmul_workspace }
}

/// What steps need is clear before the first: a memset would be a launch more in each layer. Groups as large as they
/// can be.
fn steps_clear_nothing<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let (dtype, stored, unit) = TYPES[seed as usize % 2];
    let sizes = Sizes { group: 16, heads: 2, head_dim: 64, rows: 5, keys: 80 };
    let scene = Scene { sizes, stored, unit, seed };
    let clearing = Clearing { device: device.clone(), fills: Rc::default() };
    let backend = cuda(&clearing, dtype)?;
    let kept = [[70, 1], [0, 66]];
    let (found, ..) = several_steps(&scene, &backend, &kept).map_err(|error| error.to_string())?;
    let (expected, ..) = several_steps(&scene, &cpu()?, &kept).map_err(|error| error.to_string())?;
    found.iter().zip(&expected).try_for_each(|(found, expected)| compare(found, expected))?;
    // One before the first step, and one for each sequence that is attended to by itself in the end.
    let (fills, expected) = (clearing.fills.get(), 1 + kept.len());
    if fills == expected {
        Ok(())
    } else {
        Err(format!("{fills} fills around {STEPS} steps, not {expected}"))
    }
}

const STEPS: usize = 5;

/// What the steps give, how often their operations were asked for, and what is said of the recording.
fn several_steps<B: Backend>(
    scene: &Scene,
    backend: &B,
    kept: &[[usize; 2]],
) -> Result<(Vec<Output>, usize, String), BackendError> {
    // As for the attention of one row.
    let attended = [scene.unit, 2.0 * scene.unit];
    let Sizes { group, heads, head_dim, .. } = scene.sizes;
    let kv = scene.store(backend)?;
    let stores = kept.iter().map(|lengths| {
        let list = |(head, length): (usize, &usize)| (head as u32..(head + length) as u32).collect();
        let lists = lengths.iter().enumerate().map(list).collect();
        backend.gather_kv(&kv, &backend.indices(lists)?, STEPS)
    });
    let mut batch = backend.join_kv(stores.collect::<Result<_, _>>()?, STEPS)?;
    let table = |width, seed| scene.weight(backend, &[40, width], 1.0, seed);
    let width = heads * head_dim;
    let tables = [table(group * width, 50)?, table(width, 51)?, table(width, 52)?];
    let mut ids = backend.indices(vec![vec![0; kept.len()]])?;
    let mut positions = backend.indices(vec![vec![0; kept.len()]])?;
    let mut recording = B::Recording::default();
    let (mut out, mut calls) = (None, 0);
    let mut outputs = Vec::new();
    for step in 0..STEPS as u32 {
        let each = 1..=kept.len() as u32;
        backend
            .write_list(&mut ids, &each.clone().map(|sequence| 3 * step + sequence).collect::<Vec<_>>())?;
        backend
            .write_list(&mut positions, &each.map(|sequence| 1000 * sequence + step).collect::<Vec<_>>())?;
        let work = || {
            out = None;
            calls += 1;
            let [queries, keys, values] = [0, 1, 2].map(|at| backend.embed_list(&tables[at], &ids));
            out = Some(backend.decode_attention(&queries?, &keys?, &values?, &positions, &mut batch)?);
            Ok::<_, BackendError>(())
        };
        // SAFETY: tables, lists and the batch stay as long as the recording.
        unsafe { backend.repeat(&mut recording, work) }?;
        let numbers = out.as_ref().map_or(Ok(Vec::new()), |out| backend.read(out))?;
        outputs.push(Output { what: "a step", numbers, tolerance: attended });
    }
    // The last step is not counted.
    for (sequence, kv) in backend.split_kv(batch, STEPS - 1)?.iter().enumerate() {
        let lengths = backend.kv_lengths(kv);
        let expected = kept[sequence].map(|length| length + STEPS - 1);
        assert_eq!(lengths, expected, "sequence {sequence}");
        let numbers = flat(&backend.kv_positions(kv)?);
        outputs.push(Output { what: "positions", numbers, tolerance: [0.0; 2] });
        let last = backend.slice_rows(&scene.queries(backend, 2)?, 1..2)?;
        let numbers = backend.read(&backend.attention(&last, kv, Visible::Aligned)?)?;
        outputs.push(Output { what: "attention over what is left", numbers, tolerance: attended });
        let last = lengths.iter().map(|length| vec![*length as u32 - 1]).collect();
        let gathered = backend.gather_kv(kv, &backend.indices(last)?, 0)?;
        let numbers = flat(&backend.kv_positions(&gathered)?);
        outputs.push(Output { what: "positions of the newest", numbers, tolerance: [0.0; 2] });
        let oldest = backend.gather_kv(kv, &backend.indices(vec![vec![0]; heads])?, 0)?;
        let numbers = flat(&backend.kv_positions(&oldest)?);
        outputs.push(Output { what: "positions of the oldest", numbers, tolerance: [0.0; 2] });
    }
    Ok((outputs, calls, format!("{recording:?}")))
}

/// Prompts of different lengths, read and answered together, against the same engine one by one.
fn models<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let (dtype, stored, unit) = TYPES[seed as usize % 2];
    // A vocabulary whose rows do not begin where 16 bytes do.
    let tiny = Tiny { layers: 3, seed: seed + 11, vocabulary: 73, ..model(stored) };
    let directory = tiny.write();
    let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let backend = cuda(device, dtype)?.with_chunk_rows(64);
    let engine = Engine::load(backend, &model).map_err(|error| error.to_string())?;
    let run = || {
        read_together(&engine, &tiny, seed, activations_error(unit)).map_err(|error| error.to_string())??;
        Ok::<_, String>(engine.backend().memory().0)
    };
    match [run()?, run()?] {
        [once, twice] if once == twice => Ok(()),
        [once, twice] => Err(format!("{once} bytes in use after one batch and {twice} after two")),
    }
}

fn read_together<B: Backend>(
    engine: &Engine<B>,
    tiny: &Tiny,
    seed: u64,
    allowed: f64,
) -> Result<Result<(), String>, EngineError> {
    let retention = Budget::Rate(0.5);
    let policies = [
        Policy::Full,
        Policy::FastKv(FastKv { retention, propagation: Budget::Rate(0.6), ..FastKv::proportional() }),
        Policy::SnapKv(SnapKv { retention, ..SnapKv::default() }),
        Policy::AdaKv(AdaKv { retention, ..AdaKv::default() }),
    ];
    let lengths = [70, 41, 9];
    let ids: Vec<Vec<u32>> =
        lengths.iter().map(|n| Rng::new(seed + *n as u64).ids(*n, tiny.vocabulary)).collect();
    let plans: Vec<Plan> = ids
        .iter()
        .enumerate()
        .map(|(at, ids)| policies[(seed as usize + at) % policies.len()].plan(engine.shape(), ids.len()))
        .collect::<Result<_, _>>()
        .expect("plans");
    let control = Control::default();
    let options = PrefillOptions { trace: true, slack: 8, ..PrefillOptions::default() };
    let prompts: Vec<_> = ids.iter().zip(&plans).map(|(ids, plan)| Prompt { ids, plan }).collect();
    let mut members = engine.prefill_batch(&prompts, &options, &control)?;
    // Without a trace lengths that are data are counted last.
    let untraced = PrefillOptions { trace: false, ..options };
    let alone = prompts.iter().map(|prompt| engine.prefill(prompt.ids, prompt.plan, &untraced, &control));
    let mut alone = alone.collect::<Result<Vec<_>, _>>()?;
    for (member, (found, alone)) in members.iter().zip(&alone).enumerate() {
        if let Err(error) = near(&format!("logits of {member}"), &found.logits, &alone.logits, allowed) {
            return Ok(Err(error));
        }
    }
    let wishes = [6, 4, 7].map(|max_tokens| GenerationOptions { max_tokens, ..GenerationOptions::default() });
    let turns = members.iter_mut().zip(&wishes).map(|(prefill, options)| Turn {
        cache: &mut prefill.cache,
        logits: prefill.logits.clone(),
        options,
    });
    let answers = engine.generate_batch(turns.collect(), &control, |_, _| ())?;
    for (member, answer) in answers.iter().enumerate() {
        if answer.tokens.len() != wishes[member].max_tokens {
            return Ok(Err(format!("member {member} says {:?}", answer.tokens)));
        }
        if let Err(error) = agrees(engine, &mut alone[member], &answer.tokens, allowed)? {
            return Ok(Err(format!("member {member}: {error}")));
        }
        let (found, expected) = (&members[member].cache, &alone[member].cache);
        let of_cache = |cache: &Cache<B>| cache.positions(engine.backend());
        if of_cache(found)? != of_cache(expected)? {
            return Ok(Err(format!("member {member} holds other tokens than it would alone")));
        }
    }
    Ok(Ok(()))
}

/// Each token is the likeliest by what the sequence alone says, up to rounding.
fn agrees<B: Backend>(
    engine: &Engine<B>,
    alone: &mut Prefill<B>,
    tokens: &[u32],
    allowed: f64,
) -> Result<Result<(), String>, EngineError> {
    for (step, token) in tokens.iter().enumerate() {
        let largest = alone.logits.iter().fold(0.0, |most: f32, logit| most.max(logit.abs()));
        let best = alone.logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let behind = f64::from(best - alone.logits[*token as usize]) / f64::from(largest);
        if behind > allowed {
            return Ok(Err(format!("token {step} is {token}, which is behind the likeliest by {behind:.4}")));
        }
        if step + 1 < tokens.len() {
            alone.logits = engine.append(&mut alone.cache, &[*token], &Control::default())?;
        }
    }
    Ok(Ok(()))
}

/// A list that is full stays as it is, and so do those beside it, which may be longer.
fn steps_without_room<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let (dtype, stored, unit) = TYPES[seed as usize % 2];
    let sizes = Sizes { group: 1, heads: 2, head_dim: 64, rows: 3, keys: 12 };
    let scene = Scene { sizes, stored, unit, seed };
    let backend = cuda(device, dtype)?;
    let run = || -> Result<_, BackendError> {
        let kv = scene.store(&backend)?;
        let short = backend.gather_kv(&kv, &backend.indices(vec![vec![0, 1], (0..5).collect()])?, 0)?;
        let mut batch = backend.join_kv(vec![short, kv], 1)?;
        for step in 0..4 {
            let x = scene.rows(&backend, [2, 128], 1.0, 1, true)?;
            let positions = backend.indices(vec![vec![100 + step; 2]])?;
            backend.decode_attention(&x, &x, &x, &positions, &mut batch)?;
        }
        let stores = backend.split_kv(batch, 4)?;
        stores.iter().map(|kv| backend.kv_positions(kv)).collect::<Result<Vec<_>, _>>()
    };
    let found = run().map_err(|error| error.to_string())?;
    let with_one = |length| (0..length).map(|row| 3 * row + 1).chain([100]).collect::<Vec<u32>>();
    let expected = [[2, 5], [12, 12]].map(|lengths| lengths.map(with_one));
    if found == expected { Ok(()) } else { Err(format!("the lists hold {found:?}, not {expected:?}")) }
}

/// What does not fit is an error that names the operation.
fn bad_operands<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let (dtype, stored, unit) = TYPES[seed as usize % 2];
    let sizes = Sizes { group: 1, heads: 2, head_dim: 64, rows: 3, keys: 12 };
    let scene = Scene { sizes, stored, unit, seed };
    let backend = cuda(device, dtype)?;
    let run = || -> Result<_, BackendError> {
        let mut batch = backend.join_kv(vec![scene.store(&backend)?, scene.store(&backend)?], 1)?;
        let x = scene.rows(&backend, [2, 128], 1.0, 1, true)?;
        let one = scene.rows(&backend, [1, 128], 1.0, 1, true)?;
        let narrow = scene.rows(&backend, [2, 64], 1.0, 1, true)?;
        let (two, single) = (backend.indices(vec![vec![0, 1]])?, backend.indices(vec![vec![0]])?);
        let mut attend =
            |q, k, v, positions| backend.decode_attention(q, k, v, positions, &mut batch).is_err();
        let refused = [
            attend(&one, &x, &x, &two),
            attend(&x, &one, &x, &two),
            attend(&x, &x, &narrow, &two),
            attend(&narrow, &x, &x, &two),
            attend(&x, &x, &x, &single),
            backend.join_kv(Vec::new(), 1).is_err(),
            backend.join_kv(vec![scene.store(&backend)?, backend.new_kv(1, 64, 1)?], 1).is_err(),
            backend.write_list(&mut backend.indices(vec![vec![0]])?, &[1, 2]).is_err(),
            backend.concat_rows(&[]).is_err(),
            backend.concat_rows(&[&x, &narrow]).is_err(),
            backend.slice_rows(&x, 1..3).is_err(),
        ];
        Ok(refused)
    };
    match run().map_err(|error| error.to_string())?.iter().position(|refused| !refused) {
        Some(at) => Err(format!("number {at} was taken")),
        None => Ok(()),
    }
}
