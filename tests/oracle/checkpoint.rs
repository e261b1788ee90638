//! Reads a model directory without the crate's help.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::Value;

/// A tensor in f64, row-major.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f64>,
}

/// All tensors of a directory.
pub(crate) fn tensors(directory: &Path) -> HashMap<String, Stored> {
    let mut tensors = HashMap::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            read_file(&fs::read(path).expect("a readable file"), &mut tensors);
        }
    }
    tensors
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a readable file")).expect("JSON")
}

fn read_file(bytes: &[u8], tensors: &mut HashMap<String, Stored>) {
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let (header, data) = bytes[8..].split_at(header);
    let header: serde_json::Map<String, Value> = serde_json::from_slice(header).expect("a header");
    for (name, entry) in header {
        if name == "__metadata__" {
            continue;
        }
        let numbers = |field: &str| -> Vec<usize> {
            let list = entry[field].as_array().expect("a list");
            list.iter().map(|number| number.as_u64().expect("a number") as usize).collect()
        };
        let range = numbers("data_offsets");
        let bytes = &data[range[0]..range[1]];
        let data = match entry["dtype"].as_str().expect("a dtype") {
            "F32" => bytes
                .chunks(4)
                .map(|bytes| f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])))
                .collect(),
            "BF16" => bytes
                .chunks(2)
                .map(|bytes| f64::from(f32::from_le_bytes([0, 0, bytes[0], bytes[1]])))
                .collect(),
            "F16" => bytes.chunks(2).map(|bytes| half(u16::from_le_bytes([bytes[0], bytes[1]]))).collect(),
            other => panic!("{name}: {other}"),
        };
        tensors.insert(name, Stored { shape: numbers("shape"), data });
    }
}

/// IEEE half precision: sign, 5 bits of exponent, 10 of fraction.
fn half(bits: u16) -> f64 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let exponent = i32::from(bits >> 10 & 31);
    let fraction = f64::from(bits & 1023) / 1024.0;
    match exponent {
        0 => sign * fraction * 2.0_f64.powi(-14),
        31 if fraction == 0.0 => sign * f64::INFINITY,
        31 => f64::NAN,
        _ => sign * (1.0 + fraction) * 2.0_f64.powi(exponent - 15),
    }
}
