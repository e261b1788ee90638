//! Attention steering in the form that backends take.

use crate::backend::Bias;
use crate::policy::{ModelShape, Steering};

/// One bit for each head and one for each token of the prompt.
#[derive(Clone, Debug)]
pub(crate) struct Steer {
    /// By layer and query head.
    heads: Vec<Vec<bool>>,
    highlighted: Vec<bool>,
    amount: f32,
}

impl Steer {
    pub(crate) fn new(steering: &Steering, shape: ModelShape, prompt_tokens: usize) -> Self {
        let mut heads = vec![vec![false; shape.query_heads]; shape.layers];
        steering.heads.iter().for_each(|&(layer, head)| heads[layer][head] = true);
        let mut highlighted = vec![false; prompt_tokens];
        steering.positions(prompt_tokens).iter().for_each(|position| highlighted[*position as usize] = true);
        Self { heads, highlighted, amount: steering.alpha.ln() as f32 }
    }

    /// The bias of a layer, where one of its heads is steered.
    pub(crate) fn bias(&self, layer: usize) -> Option<Bias<'_>> {
        let heads = &self.heads[layer];
        let bias = Bias { heads, highlighted: &self.highlighted, amount: self.amount };
        heads.contains(&true).then_some(bias)
    }

    /// For each token of the prompt, whether it is highlighted.
    pub(crate) fn highlighted(&self) -> &[bool] {
        &self.highlighted
    }

    pub(crate) fn highlighted_tokens(&self) -> usize {
        self.highlighted.iter().filter(|highlighted| **highlighted).count()
    }

    /// The rows at these positions that are highlighted.
    pub(crate) fn rows(&self, positions: &[u32]) -> Vec<u32> {
        let is_highlighted = |position: u32| self.highlighted.get(position as usize) == Some(&true);
        (0..positions.len() as u32).filter(|row| is_highlighted(positions[*row as usize])).collect()
    }

    /// For a prompt of these tokens alone.
    pub(crate) fn of_tokens(&self, positions: &[u32]) -> Self {
        let highlighted = positions.iter().map(|position| self.highlighted[*position as usize]).collect();
        Self { highlighted, ..self.clone() }
    }
}
