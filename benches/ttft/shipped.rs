//! The shipped model on the CPU, by criterion.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use fastkv::backend::cpu::CpuBackend;
use fastkv::engine::{Control, Engine, PrefillOptions};
use fastkv::measure::random_tokens;
use fastkv::model::ModelDir;
use fastkv::policy::{Budget, FastKv, Policy, SnapKv, StreamingLlm};

const LENGTHS: [usize; 4] = [1024, 2048, 4096, 8192];

pub(crate) fn measure(criterion: &mut Criterion) {
    let engine = shipped_model().expect("the shipped model loads");
    let fastkv = FastKv {
        retention: Budget::Rate(1.0 / 16.0),
        propagation: Budget::Rate(0.25),
        ..FastKv::proportional()
    };
    let policies = [
        ("full", Policy::Full),
        ("fastkv, rate 0.1 and 0.2", Policy::FastKv(FastKv::proportional())),
        ("fastkv, rate 1/16 and 1/4", Policy::FastKv(fastkv)),
        ("snapkv", Policy::SnapKv(SnapKv::default())),
        ("streamingllm", Policy::StreamingLlm(StreamingLlm::default())),
    ];
    for tokens in LENGTHS {
        let ids = random_tokens(tokens, engine.config().vocab_size, 1);
        let mut group = criterion.benchmark_group(format!("ttft/{tokens} tokens"));
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(10)
            .throughput(Throughput::Elements(tokens as u64));
        group.warm_up_time(Duration::from_millis(500));
        for (name, policy) in &policies {
            let plan = policy.plan(engine.shape(), tokens).expect("the options are valid");
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter(|| {
                    engine
                        .prefill(&ids, &plan, &PrefillOptions::default(), &Control::default())
                        .expect("the prompt is valid")
                        .logits
                });
            });
        }
        group.finish();
    }
}

fn shipped_model() -> anyhow::Result<Engine<CpuBackend>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/needle");
    let model = ModelDir::open(&directory).with_context(|| format!("{}", directory.display()))?;
    Ok(Engine::load(CpuBackend::new(None)?, &model)?)
}
