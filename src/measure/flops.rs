//! The products of a prefill, counted.

use std::borrow::Cow;

use crate::model::LlamaConfig;
use crate::policy::Plan;

/// Multiplications and additions of the matrix products and the attention that a plan asks for, with or without the
/// [exact shortcuts](crate::engine::PrefillOptions::exact_shortcuts). What scores and selections take is left out.
///
/// A matrix of `e` elements takes `2 · rows · e`; a row that sees `s` keys `4 · s · query heads · head_dim`, where
/// rows among the keys see half of them.
///
/// `tsp_layer` is the one that was [picked](crate::engine::Prefill::tsp_layer), where a plan has candidates; without it
/// the last of them counts.
pub fn prefill_flops(
    config: &LlamaConfig,
    plan: &Plan,
    tsp_layer: Option<usize>,
    exact_shortcuts: bool,
) -> f64 {
    let hidden = config.hidden_size as f64;
    let queries = (config.query_heads * config.head_dim) as f64;
    let keys = (config.kv_heads * config.head_dim) as f64;
    // K and V of every row; Q, output projection and MLP of the rows that go on.
    let of_keys = |rows: f64| 2.0 * rows * 2.0 * keys * hidden;
    let of_rows =
        |rows: f64| 2.0 * rows * (2.0 * queries * hidden + 3.0 * config.intermediate_size as f64 * hidden);
    let attention = |rows: f64, keys: f64, seen: f64| 4.0 * rows * keys * seen * queries;
    let mut sum = 2.0 * hidden * config.vocab_size as f64;
    if let Some(restart) = plan.restart {
        let rows = plan.prompt_tokens as f64;
        // The layer that ranks needs its keys only.
        sum += restart.layer as f64 * (of_keys(rows) + of_rows(rows) + attention(rows, rows, 0.5))
            + of_keys(rows);
    }
    for (index, of_last) in plan.layers.iter().enumerate() {
        let layer = match tsp_layer {
            Some(_) => plan.rules(index, tsp_layer),
            None => Cow::Borrowed(of_last),
        };
        let rows = layer.rows as f64;
        let (going_on, seen) = match layer.propagate {
            _ if !exact_shortcuts => (rows, 0.5),
            Some(propagate) => (propagate.count() as f64, 0.5),
            None if index + 1 == plan.layers.len() => (1.0, 1.0),
            None => (rows, 0.5),
        };
        sum += of_keys(rows) + of_rows(going_on) + attention(going_on, rows, seen);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::shape;
    use crate::policy::{FastKv, GemFilter, Policy};

    fn flops(policy: &Policy, tokens: usize, exact_shortcuts: bool) -> f64 {
        let config = shape("llama-3.1-8b").expect("a shape");
        let plan = policy.plan((&config).into(), tokens).expect("valid");
        prefill_flops(&config, &plan, None, exact_shortcuts)
    }

    /// Figures as they are published or derived by hand, and half a unit of their last digit.
    fn assert_near(value: f64, figure: f64, digit: f64, what: &str) {
        assert!((value - figure).abs() <= 0.5 * digit + 1e-9, "{what}: {value} is not {figure}");
    }

    #[test]
    fn the_table_of_the_algorithms_holds() {
        let fastkv = Policy::FastKv(FastKv::proportional());
        for (tokens, full, with_fastkv, published, both) in [
            (8_192, 0.132, 0.078, 1.70, 1.73),
            (32_768, 0.739, 0.421, 1.76, 1.79),
            (65_536, 2.041, 1.134, 1.80, 1.84),
            (131_072, 6.333, 3.440, 1.84, 1.88),
        ] {
            let [plain, shortened] = [false, true]
                .map(|exact| [&Policy::Full, &fastkv].map(|policy| flops(policy, tokens, exact)));
            assert_near(plain[0] / 1e15, full, 1e-3, "full");
            assert_near(plain[1] / 1e15, with_fastkv, 1e-3, "fastkv");
            assert_near(plain[0] / plain[1], published, 0.01, "as published");
            assert_near(shortened[0] / shortened[1], both, 0.01, "both with the shortcuts");
        }
        let constant = Policy::FastKv(FastKv::constant());
        for (tokens, bound) in [(8_192, 1.63), (32_768, 1.92), (65_536, 1.97), (131_072, 1.99)] {
            let bound_of = flops(&Policy::Full, tokens, false) / flops(&constant, tokens, false);
            assert_near(bound_of, bound, 0.01, "constant");
        }
    }

    #[test]
    fn a_restart_reads_twice() {
        let gemfilter = Policy::GemFilter(GemFilter::default());
        let config = shape("llama-3.1-8b").expect("a shape");
        let plan = gemfilter.plan((&config).into(), 32_768).expect("valid");
        let restart = plan.restart.expect("it restarts");
        // 13 layers of 436.2 M products a token and causal attention, the keys of one more, and a prompt of its own.
        let token = 33_554_432.0 * 2.0 + 16_777_216.0 + 352_321_536.0;
        let first = 13.0 * (32_768.0 * token + 8192.0 * 32_768_f64.powi(2)) + 32_768.0 * 16_777_216.0;
        let expected = first + flops(&Policy::Full, restart.count, true);
        let value = prefill_flops(&config, &plan, None, true);
        assert!((value / expected - 1.0).abs() < 1e-12, "{value} {expected}");
    }
}
