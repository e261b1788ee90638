//! Rotary position embedding: the angles.
//!
//! The rotation is the half-split one of Hugging Face Llama: with `d = head_dim` and `i < d/2`, the
//! pair `(x[i], x[i + d/2])` at position `p` turns by `p · f[i]`, `f` being the inverse frequencies:
//!
//! ```text
//! y[i]       = x[i] · cos(p·f[i]) − x[i + d/2] · sin(p·f[i])
//! y[i + d/2] = x[i + d/2] · cos(p·f[i]) + x[i] · sin(p·f[i])
//! ```
//!
//! (Meta's own files interleave the pairs; Hugging Face checkpoints have permuted weights instead.)

use serde::Serialize;

use super::ModelError;
use super::json::Fields;

/// Base of the rotary frequencies and how they are stretched beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RopeConfig {
    /// Base wavelength: without scaling, `f[i] = theta^(-2i/d)`.
    pub theta: f64,
    /// Stretching.
    pub scaling: RopeScaling,
}

/// How the frequencies are changed for contexts longer than those of the first training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by `factor`, at every length.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// NTK by length: above `original` tokens the base grows with the sequence length.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// `max_position_embeddings`: up to this length nothing changes.
        original: usize,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the first training, in tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// The inverse frequencies `f`, `head_dim / 2` of them, in the float32 steps of transformers.
    ///
    /// `sequence_length` is the highest position plus 1; only [`RopeScaling::Dynamic`] looks at it.
    /// While decoding, transformers gives each new token the table of the length reached and leaves
    /// the cached keys turned as they were.
    pub fn inverse_frequencies(&self, head_dim: usize, sequence_length: usize) -> Vec<f32> {
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor, original } if sequence_length > original => {
                let dim = head_dim as f64;
                let stretch =
                    factor as f32 * sequence_length as f32 / original as f32 - (factor - 1.0) as f32;
                self.theta as f32 * power(stretch, (dim / (dim - 2.0)) as f32)
            }
            _ => self.theta as f32,
        };
        (0..head_dim / 2)
            .map(|pair| 1.0 / power(theta, (2 * pair) as f32 / head_dim as f32))
            .map(|frequency| self.scaling.stretched(frequency))
            .collect()
    }

    /// Reads `rope_scaling` or `rope_parameters`, whichever is used, and `rope_theta` in either place.
    pub(super) fn read(config: &Fields<'_>, max_position_embeddings: usize) -> Result<Self, ModelError> {
        refuse_partial_rotation(config)?;
        // The order of transformers: the old name wins where both are there.
        let parameters = match config.object("rope_scaling")? {
            Some(scaling) => Some(scaling),
            None => config.object("rope_parameters")?,
        };
        let Some(parameters) = parameters else {
            return Ok(Self {
                theta: theta(config)?.unwrap_or(DEFAULT_THETA),
                scaling: RopeScaling::Default,
            });
        };
        refuse_partial_rotation(&parameters)?;
        if let Some((key, _)) = parameters.iter().find(|(_, value)| value.is_object()) {
            return Err(parameters.unsupported(key, "one set of RoPE parameters for all layers"));
        }
        let theta = match theta(&parameters)? {
            Some(theta) => theta,
            None => theta_or_default(config)?,
        };
        Ok(Self { theta, scaling: RopeScaling::read(config, &parameters, max_position_embeddings)? })
    }
}

impl RopeScaling {
    fn read(
        config: &Fields<'_>,
        parameters: &Fields<'_>,
        max_position_embeddings: usize,
    ) -> Result<Self, ModelError> {
        let key = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
        let factor =
            || parameters.required_number("factor", "a number of at least 1", |factor| factor >= 1.0);
        let positive = |field| parameters.required_number(field, "a number above 0", |number| number > 0.0);
        match parameters.string(key)? {
            None | Some("default") => Ok(Self::Default),
            Some("linear") => Ok(Self::Linear { factor: factor()? }),
            Some("dynamic") => Ok(Self::Dynamic { factor: factor()?, original: max_position_embeddings }),
            Some("llama3") => {
                let low_freq_factor = positive("low_freq_factor")?;
                let high_freq_factor = positive("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return Err(parameters
                        .wrong("high_freq_factor", &format!("above low_freq_factor = {low_freq_factor}")));
                }
                // A value outside the parameters wins, as in transformers.
                let field = "original_max_position_embeddings";
                let original = match config.count(field, MAX_POSITIONS)? {
                    Some(original) => Some(original),
                    None => parameters.count(field, MAX_POSITIONS)?,
                };
                Ok(Self::Llama3 {
                    factor: factor()?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original.unwrap_or(max_position_embeddings),
                })
            }
            Some(_) => Err(parameters.unsupported(key, "default, linear, dynamic, llama3")),
        }
    }

    fn stretched(self, frequency: f32) -> f32 {
        match self {
            Self::Default | Self::Dynamic { .. } => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let factor = factor as f32;
                let original = original_max_position_embeddings as f64;
                // `a / x` is `a · (1/x)` in PyTorch; the same here keeps the last bit.
                let wavelength = (1.0 / frequency) * std::f32::consts::TAU;
                if wavelength > (original / low_freq_factor) as f32 {
                    frequency / factor
                } else if wavelength < (original / high_freq_factor) as f32 {
                    frequency
                } else {
                    let smooth = ((1.0 / wavelength) * original as f32 - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Positions are i32 in the kernels.
pub(super) const MAX_POSITIONS: usize = i32::MAX as usize;

const DEFAULT_THETA: f64 = 10_000.0;

fn theta(fields: &Fields<'_>) -> Result<Option<f64>, ModelError> {
    // Above this the base no longer fits float32 once NTK has scaled it.
    fields.number("rope_theta", "a number above 0 and at most 1e30", |theta| theta > 0.0 && theta <= 1e30)
}

fn theta_or_default(fields: &Fields<'_>) -> Result<f64, ModelError> {
    Ok(theta(fields)?.unwrap_or(DEFAULT_THETA))
}

fn refuse_partial_rotation(fields: &Fields<'_>) -> Result<(), ModelError> {
    match fields.number("partial_rotary_factor", "1", |_| true)? {
        Some(factor) if factor != 1.0 => Err(fields.unsupported("partial_rotary_factor", "1, or absent")),
        _ => Ok(()),
    }
}

/// `base^exponent` rounded once: closer to every library's float32 power than that of any one of them.
fn power(base: f32, exponent: f32) -> f32 {
    f64::from(base).powf(f64::from(exponent)) as f32
}
