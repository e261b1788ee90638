//! The CPU backend, operation by operation, on one thread, two and five.

#![cfg(feature = "pipeline")]

mod cases;
mod oracle;
mod tiny;

use cases::policies::policy_tests;
use cases::{Bench, backend_tests};
use fastkv::backend::BackendError;
use fastkv::backend::cpu::CpuBackend;

fn benches() -> Vec<Bench<CpuBackend>> {
    let bench = |threads| {
        let backend = CpuBackend::new(Some(threads)).expect("threads");
        assert_eq!(backend.threads(), threads);
        // f32, and the error its exponential states.
        Bench { backend, unit: f64::from(f32::EPSILON) / 2.0, exp: 2e-7 }
    };
    [1, 2, 5].map(bench).into()
}

backend_tests!(benches());
policy_tests!(benches());

#[test]
fn memory_that_cannot_be_had_is_an_error_with_the_figure() {
    use fastkv::backend::Backend;
    let backend = CpuBackend::new(Some(1)).expect("a thread");
    for capacity in [1 << 50, usize::MAX] {
        let error = backend.new_kv(1, 128, capacity).expect_err("too much");
        assert!(matches!(error, BackendError::OutOfMemory { .. }), "{error}");
        assert!(error.to_string().contains("bytes"), "{error}");
    }
}
