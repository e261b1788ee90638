//! Several prompts at once: each is answered as it is alone.

use super::*;

/// Lengths on all sides of windows and chunks.
const LENGTHS: [usize; 7] = [33, 1, 150, 64, 7, 140, 65];

fn prompts(vocabulary: usize) -> Vec<Vec<u32>> {
    LENGTHS.iter().enumerate().map(|(seed, n)| Rng::new(90 + seed as u64).ids(*n, vocabulary)).collect()
}

fn together<B: Backend>(
    rig: &Rig<B>,
    ids: &[Vec<u32>],
    plans: &[Plan],
    options: &PrefillOptions,
) -> Vec<Prefill<B>> {
    let prompts: Vec<_> = ids.iter().zip(plans).map(|(ids, plan)| Prompt { ids, plan }).collect();
    rig.engine.prefill_batch(&prompts, options, &Control::default()).expect("prefills")
}

/// What was read together is what is read alone.
fn same_prefills<B: Backend>(rig: &Rig<B>, found: &[Prefill<B>], alone: &[Prefill<B>]) {
    for (member, (found, alone)) in found.iter().zip(alone).enumerate() {
        assert_eq!(rig.positions(found), rig.positions(alone), "member {member}");
        assert_eq!(found.cache.logical_length(), alone.cache.logical_length());
        assert_eq!(found.peak_kv_bytes, alone.peak_kv_bytes);
        let (trace, expected) =
            (found.trace.as_ref().expect("a trace"), alone.trace.as_ref().expect("a trace"));
        assert_eq!(trace.restarted, expected.restarted);
        for (layer, expected) in trace.layers.iter().zip(&expected.layers) {
            assert_eq!((layer.rows, &layer.kept), (expected.rows, &expected.kept), "member {member}");
            assert_eq!(layer.propagated, expected.propagated);
            let off = layer.mass.iter().zip(&expected.mass).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "member {member}: masses are off by {off}");
        }
        close(&format!("member {member}"), &found.logits, &alone.logits);
    }
}

fn close(what: &str, found: &[f32], expected: &[f32]) {
    let expected: Vec<f64> = expected.iter().copied().map(f64::from).collect();
    let distance = relative_distance(found, &expected);
    assert!(distance < CLOSE, "{what} is off by {distance:e}");
}

#[test]
fn prompts_read_together_are_read_as_if_alone() {
    for (name, tiny) in models() {
        let rig = rig_on(&tiny, Probe::new(64));
        let ids = prompts(tiny.vocabulary);
        let policies = policies_of(rig.engine.shape());
        for (round, exact_shortcuts) in [true, false].into_iter().enumerate() {
            // Seven at a time, until every policy had its turn.
            for first in (0..policies.len()).step_by(ids.len()) {
                let policy = |at: usize| &policies[(first + at + round) % policies.len()];
                let plans: Vec<Plan> =
                    ids.iter().enumerate().map(|(at, ids)| rig.plan(policy(at), ids.len())).collect();
                let options = PrefillOptions { exact_shortcuts, ..TRACED };
                let alone: Vec<_> = ids
                    .iter()
                    .zip(&plans)
                    .map(|(ids, plan)| rig.engine.prefill(ids, plan, &options, &Control::default()))
                    .map(|prefill| prefill.expect("a prefill"))
                    .collect();
                println!("{name}, from {}", policy(0).name());
                same_prefills(&rig, &together(&rig, &ids, &plans, &options), &alone);
            }
        }
    }
}

#[test]
fn no_prompts_have_no_answers() {
    let rig = rig(&Tiny::default());
    assert!(together(&rig, &[], &[], &TRACED).is_empty());
    let answers = rig.engine.generate_batch(Vec::new(), &Control::default(), |_, _| ());
    assert!(answers.expect("no answers").is_empty());
}

#[test]
fn one_bad_prompt_is_an_error() {
    let rig = rig(&Tiny::default());
    let plan = rig.plan(&Policy::Full, 3);
    let good = Prompt { ids: &[1, 2, 3], plan: &plan };
    for (bad, problem) in [
        (Prompt { ids: &[1, 2, 99], ..good }, "token 99 at position 2"),
        (Prompt { ids: &[1, 2], ..good }, "the plan is for 3 tokens"),
        (Prompt { ids: &[], ..good }, "no tokens"),
    ] {
        let error = rig.engine.prefill_batch(&[good, bad], &TRACED, &Control::default());
        let error = error.map(|_| ()).expect_err("a bad prompt").to_string();
        assert!(error.contains(problem), "{error}");
    }
}

/// Policies of each kind: those whose caches step together, and those that do not.
fn decoding_policies() -> Vec<Policy> {
    vec![
        Policy::Full,
        Policy::H2o(H2o { window: 8, retention: Budget::Tokens(20) }),
        Policy::FastKv(FastKv { propagation: Budget::Rate(0.5), ..FastKv::proportional() }),
        Policy::AdaKv(AdaKv { retention: Budget::Rate(0.4), ..AdaKv::default() }),
        Policy::GemFilter(GemFilter { retention: Budget::Rate(0.5), ..GemFilter::default() }),
        Policy::FastGen(FastGen { recovery: 0.6, classes: classes(), ..FastGen::default() }),
        Policy::SnapKv(SnapKv { retention: Budget::Rate(0.3), ..SnapKv::default() }),
    ]
}

/// A member may end at once, at a stop token, or go on when others have ended; one is sampled.
fn wishes(stop: u32) -> Vec<GenerationOptions> {
    let options = |max_tokens| GenerationOptions { max_tokens, ..GenerationOptions::default() };
    let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 3 };
    vec![
        options(9),
        options(5),
        GenerationOptions { stop_tokens: vec![stop], ..options(30) },
        GenerationOptions { sampling, ..options(12) },
        options(0),
        options(7),
        options(20),
    ]
}

#[test]
fn answers_given_together_are_those_given_alone() {
    for (name, tiny) in models() {
        let rig = rig(&tiny);
        let ids = prompts(tiny.vocabulary);
        let plans: Vec<Plan> =
            ids.iter().zip(decoding_policies()).map(|(ids, policy)| rig.plan(&policy, ids.len())).collect();
        let wishes = wishes(5);
        for slack in [0, 30] {
            let options = PrefillOptions { slack, ..TRACED };
            let mut members = together(&rig, &ids, &plans, &options);
            let mut alone = together(&rig, &ids, &plans, &options);
            let mut streamed = vec![Vec::new(); members.len()];
            let turns = members.iter_mut().zip(&wishes).map(|(prefill, options)| Turn {
                cache: &mut prefill.cache,
                logits: prefill.logits.clone(),
                options,
            });
            let answers = rig
                .engine
                .generate_batch(turns.collect(), &Control::default(), |member, token| {
                    streamed[member].push(token)
                })
                .expect("answers");
            for (member, (found, expected)) in members.iter_mut().zip(&mut alone).enumerate() {
                let answer = one_by_one(&rig, expected, &wishes[member]);
                assert_eq!(answers[member], answer, "{name}, member {member}");
                assert_eq!(streamed[member], answer.tokens);
                assert_eq!(rig.positions(found), rig.positions(expected), "{name}, member {member}");
                assert_eq!(found.cache.logical_length(), expected.cache.logical_length());
                let (found, expected) = (rig.append(found, &[1, 2]), rig.append(expected, &[1, 2]));
                close(&format!("{name}, member {member}"), &found, &expected);
            }
        }
    }
}

/// The answer by way of [`Engine::append`], a token at a time.
fn one_by_one<B: Backend>(rig: &Rig<B>, prefill: &mut Prefill<B>, options: &GenerationOptions) -> Generation {
    let mut sampler = Sampler::new(options.sampling).expect("a sampler");
    let mut tokens = Vec::new();
    while tokens.len() < options.max_tokens {
        let token = sampler.choose(&prefill.logits);
        if options.stop_tokens.contains(&token) {
            return Generation { tokens, finish: FinishReason::Stop };
        }
        tokens.push(token);
        if tokens.len() < options.max_tokens {
            prefill.logits = rig.append(prefill, &[token]);
        }
    }
    Generation { tokens, finish: FinishReason::MaxTokens }
}

#[test]
fn answers_go_on_where_room_ran_out() {
    let tiny = Tiny { layers: 2, ..Tiny::default() };
    let rig = rig_on(&tiny, Probe::new(64));
    let ids = prompts(tiny.vocabulary);
    let plans: Vec<Plan> = ids[..2].iter().map(|ids| rig.plan(&Policy::Full, ids.len())).collect();
    let options = GenerationOptions { max_tokens: 600, ..GenerationOptions::default() };
    let mut members = together(&rig, &ids[..2], &plans, &TRACED);
    let mut alone = together(&rig, &ids[..2], &plans, &TRACED);
    let turns = members.iter_mut().map(|prefill| Turn {
        cache: &mut prefill.cache,
        logits: prefill.logits.clone(),
        options: &options,
    });
    let answers =
        rig.engine.generate_batch(turns.collect(), &Control::default(), |_, _| ()).expect("answers");
    for (answer, alone) in answers.iter().zip(&mut alone) {
        assert_eq!(*answer, one_by_one(&rig, alone, &options));
    }
}

#[test]
fn a_step_that_fails_leaves_what_was_before() {
    let tiny = Tiny::default();
    let rig = rig_on(&tiny, Probe::new(64));
    let ids = prompts(tiny.vocabulary);
    let options = GenerationOptions { max_tokens: 8, ..GenerationOptions::default() };
    // In the first layer and in the last one of a step, the first step and a later one.
    for failing in [1, 4, 9, 12] {
        let plans: Vec<Plan> = ids[..3].iter().map(|ids| rig.plan(&Policy::Full, ids.len())).collect();
        let mut members = together(&rig, &ids[..3], &plans, &TRACED);
        rig.engine.backend().fail_decoding(failing);
        let turns = members.iter_mut().map(|prefill| Turn {
            cache: &mut prefill.cache,
            logits: prefill.logits.clone(),
            options: &options,
        });
        let mut streamed = vec![Vec::new(); 3];
        let error = rig
            .engine
            .generate_batch(turns.collect(), &Control::default(), |member, token| {
                streamed[member].push(token)
            })
            .expect_err("a failure");
        assert!(matches!(error, EngineError::Backend(BackendError::OutOfMemory { .. })), "{error}");
        let steps = (failing - 1) / tiny.layers;
        for (member, prefill) in members.iter_mut().enumerate() {
            let length = ids[member].len() + steps;
            assert_eq!(prefill.cache.logical_length(), length);
            assert!(rig.positions(prefill).iter().flatten().all(|head| head.len() == length));
            let mut tokens = ids[member].clone();
            tokens.extend(&streamed[member]);
            assert_eq!(tokens.len(), length + 1);
            let plan = rig.plan(&Policy::Full, tokens.len());
            let expected =
                rig.engine.prefill(&tokens, &plan, &TRACED, &Control::default()).expect("a prefill");
            let token = *streamed[member].last().expect("a token");
            close("what follows", &rig.append(prefill, &[token]), &expected.logits);
        }
    }
}

#[test]
fn caches_that_were_lost_say_so() {
    let tiny = Tiny::default();
    let rig = rig_on(&tiny, Probe::new(64));
    let mut prefill = rig.prefill(&[1, 2, 3], &Policy::Full, &TRACED);
    rig.engine.backend().fail_joining();
    let options = GenerationOptions { max_tokens: 3, ..GenerationOptions::default() };
    let generate = |prefill: &mut Prefill<Probe>| {
        let logits = prefill.logits.clone();
        rig.engine.generate(&mut prefill.cache, logits, &options, &Control::default(), |_| ())
    };
    let error = generate(&mut prefill).expect_err("a failure");
    assert!(matches!(error, EngineError::Backend(_)), "{error}");
    assert!(matches!(generate(&mut prefill), Err(EngineError::LostCache)));
    let appended = rig.engine.append(&mut prefill.cache, &[1], &Control::default());
    assert!(matches!(appended, Err(EngineError::LostCache)));
}

#[test]
fn cancelled_answers_keep_what_there_is() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = prompts(tiny.vocabulary);
    let policies = [Policy::Full, Policy::H2o(H2o { window: 8, retention: Budget::Tokens(20) })];
    let plans: Vec<Plan> =
        ids.iter().zip(&policies).map(|(ids, policy)| rig.plan(policy, ids.len())).collect();
    let mut members = together(&rig, &ids[..2], &plans, &TRACED);
    let options = GenerationOptions { max_tokens: 9, ..GenerationOptions::default() };
    let turns = members.iter_mut().map(|prefill| Turn {
        cache: &mut prefill.cache,
        logits: prefill.logits.clone(),
        options: &options,
    });
    let cancel = Cancel::default();
    let control = Control { cancel: Some(&cancel), progress: None };
    let mut count = 0;
    let answers = rig
        .engine
        .generate_batch(turns.collect(), &control, |_, _| {
            count += 1;
            if count == 6 {
                cancel.cancel();
            }
        })
        .expect("no error");
    for (answer, prefill) in answers.iter().zip(&members) {
        assert_eq!((answer.tokens.len(), answer.finish), (3, FinishReason::Cancelled));
        assert!(prefill.cache.logical_length() >= 2);
    }
}

#[test]
fn a_batch_takes_no_more_memory_than_its_members() {
    let tiny = Tiny::default();
    for policy in decoding_policies() {
        let rig = rig_on(&tiny, Probe::new(64));
        let ids = prompts(tiny.vocabulary);
        let plans: Vec<Plan> = ids.iter().map(|ids| rig.plan(&policy, ids.len())).collect();
        let options = MemoryOptions {
            weight_bytes: 1000,
            chunk_rows: 64,
            kv_element_bytes: 4,
            windows_at_once: 0,
            more_tokens: 0,
        };
        let config = rig.engine.config();
        let all = MemoryEstimate::together(config, &plans.iter().collect::<Vec<_>>(), &options);
        let alone = plans.iter().map(|plan| MemoryEstimate::new(config, plan, &options));
        let sum =
            |part: fn(&MemoryEstimate) -> u64| alone.clone().map(|estimate| part(&estimate)).sum::<u64>();
        assert_eq!(all.weights, 1000);
        assert_eq!(all.kv_full, sum(|estimate| estimate.kv_full));
        assert_eq!(all.kv_kept, sum(|estimate| estimate.kv_kept));
        assert_eq!(all.kv_peak, sum(|estimate| estimate.kv_peak));
        // Temporaries are those of one chunk.
        let longest = alone.clone().map(|estimate| estimate.activations).max().expect("members");
        assert_eq!(MemoryEstimate::together(config, &[], &options).total(), 1000);
        assert!(longest < all.activations && all.activations < sum(|estimate| estimate.activations));
        let members = together(&rig, &ids, &plans, &PrefillOptions::default());
        let peak = (rig.engine.backend().peak() * 2 * tiny.head_dim * 4) as u64;
        assert!(peak <= all.kv_peak, "{}: {peak} of {}", policy.name(), all.kv_peak);
        let kept =
            members.iter().map(|prefill| prefill.cache.bytes(rig.engine.backend()) as u64).sum::<u64>();
        assert!(kept <= all.kv_kept);
    }
}
