//! What the kernels ask of a model.

use super::shape;
use crate::backend::BackendError;
use crate::kernels::norm::MAX_WIDTH;
use crate::model::LlamaConfig;

/// Sizes of heads that the kernels of attention exist for.
const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// Rows are read 16 bytes at a time.
const WIDTH: usize = 8;

/// Whether there are kernels for a model: best asked before its weights are loaded.
///
/// # Errors
/// The first size that there are none for.
pub fn check_model(config: &LlamaConfig) -> Result<(), BackendError> {
    let refuse = |problem| Err(shape("a CUDA backend", problem));
    let LlamaConfig { head_dim, hidden_size, intermediate_size, .. } = *config;
    if !HEAD_DIMS.contains(&head_dim) {
        return refuse(format!("heads of a size of {head_dim}; there are kernels for {HEAD_DIMS:?}"));
    }
    for (name, width) in [("hidden_size", hidden_size), ("intermediate_size", intermediate_size)] {
        if !width.is_multiple_of(WIDTH) {
            return refuse(format!("a {name} of {width}; there are kernels for multiples of {WIDTH}"));
        }
    }
    if hidden_size > MAX_WIDTH as usize {
        return refuse(format!("a hidden_size of {hidden_size}; there are kernels up to {MAX_WIDTH}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::shape;

    #[test]
    fn models_without_kernels_are_refused_by_the_size() {
        let llama = shape("llama-3.1-8b").expect("a shape");
        let with = |change: fn(&mut LlamaConfig)| {
            let mut config = llama.clone();
            change(&mut config);
            check_model(&config).map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| ()), Ok(()));
        assert_eq!(with(|config| config.vocab_size = 32_001), Ok(()));
        assert_eq!(with(|config| config.hidden_size = 16_384), Ok(()));
        for (change, value) in [
            ((|config| config.head_dim = 80) as fn(&mut LlamaConfig), "80"),
            (|config| config.hidden_size = 4100, "hidden_size of 4100"),
            (|config| config.intermediate_size = 11_009, "intermediate_size of 11009"),
            (|config| config.hidden_size = 16_392, "hidden_size of 16392"),
        ] {
            let error = with(change).expect_err(value);
            assert!(error.contains(value), "{error}");
        }
    }
}
