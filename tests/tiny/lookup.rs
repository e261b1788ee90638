//! A model that looks things up, with weights set by hand: it finds the last two tokens earlier in the text
//! and says what stood behind them. So it answers needle prompts of its dialect right, with no training.
//!
//! The residual stream has four parts, each a token's code: the token itself, the one before it, the one
//! before that, and what is said. Layer 0 fills the second and third by heads that look one and two
//! positions back: constant queries and keys, which the rotary embedding turns against each other. Layer 1
//! compares (token, one before) with (one before, two before) of earlier positions, in dimensions that hardly
//! turn, and moves the token found there to the fourth part, which the output matrix reads.

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Rng, Stored, Tensor, Tiny};

/// Elements of a token's code, ±1.
const CODE: usize = 32;
/// Elements that are 1 in every token.
const CONSTANT: usize = 8;
const HIDDEN: usize = 4 * CODE + CONSTANT;
const HEAD: usize = 128;
const QUERY_HEADS: usize = 4;
const KV_HEADS: usize = 2;
/// So large that the second half of the pairs turns by less than 0.1 in the whole context.
const THETA: f64 = 1e10;
/// How sharply heads attend.
const SHARP: f32 = 20.0;
const SPECIAL: [&str; 3] = ["<s>", "<unk>", "<pad>"];

/// The language.
fn dialect() -> Value {
    let list = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let numbers: Vec<String> = (10..70).map(|number| number.to_string()).collect();
    json!({
        "answer_end": ".",
        "needle": {
            "sentence": "the number of {adjective} {animal} {value} .",
            "question": "question : the number of {adjective} {animal}",
            "numbers_per_value": 3,
        },
        "tasks": {
            "single": { "needles": 1 },
            "multikey": { "needles": 8 },
            "hard": { "needles": 8, "adjectives_drawn": 3, "animals_drawn": 3 },
        },
        "filler": [{ "probability": 1.0, "templates": ["{person} went home .", "{person} saw {person} there ."] }],
        "words": {
            "adjective": list("calm eager gentle happy lazy proud quick royal"),
            "animal": list("bear cat deer eagle fox goat hare owl"),
            "person": list("anna ben clara david"),
            "number": numbers,
        },
    })
}

/// The vocabulary: special tokens, fixed words, and the dialect's lists.
fn words() -> Vec<String> {
    let fixed = "the number of . question : went home saw there";
    let mut words: Vec<String> = SPECIAL.iter().copied().chain(fixed.split(' ')).map(str::to_owned).collect();
    for list in dialect()["words"].as_object().expect("lists").values() {
        words.extend(
            list.as_array().expect("words").iter().map(|word| word.as_str().expect("text").to_owned()),
        );
    }
    words
}

/// Writes the model's directory.
pub(crate) fn write() -> TempDir {
    let directory = write_words(&words(), &json!({ "type": "WhitespaceSplit" }), &Value::Null);
    std::fs::write(directory.path().join("dialect.json"), dialect().to_string())
        .expect("a writable directory");
    directory
}

/// Writes a model without a dialect. Its tokens are the pieces of the texts: words, digits and marks.
pub(crate) fn write_for(texts: &[String]) -> TempDir {
    let mut words: Vec<String> = SPECIAL.map(str::to_owned).into();
    for piece in texts.iter().flat_map(|text| pieces(text)) {
        if !words.contains(&piece) {
            words.push(piece);
        }
    }
    let splits = json!([
        { "type": "WhitespaceSplit" },
        { "type": "Punctuation", "behavior": "Isolated" },
        { "type": "Digits", "individual_digits": true },
    ]);
    write_words(&words, &json!({ "type": "Sequence", "pretokenizers": splits }), &json!({ "type": "Fuse" }))
}

/// Words, digits and marks of a text.
fn pieces(text: &str) -> Vec<String> {
    let mut pieces: Vec<String> = Vec::new();
    let mut inside = false;
    for char in text.chars() {
        match pieces.last_mut().filter(|_| inside && char.is_alphabetic()) {
            Some(word) => word.push(char),
            None if char.is_whitespace() => {}
            None => pieces.push(char.to_string()),
        }
        inside = char.is_alphabetic();
    }
    pieces
}

fn write_words(words: &[String], pre_tokenizer: &Value, decoder: &Value) -> TempDir {
    let tiny = Tiny {
        layers: 2,
        hidden: HIDDEN,
        intermediate: 8,
        query_heads: QUERY_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD,
        vocabulary: words.len(),
        rope: json!({ "rope_theta": THETA }),
        ..Tiny::default()
    };
    let mut rng = Rng::new(3);
    let code: Vec<Vec<f32>> = words
        .iter()
        .map(|_| (0..CODE).map(|_| if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect())
        .collect();
    let mut tensors = tiny.tensors();
    for tensor in &mut tensors {
        set(tensor, &code);
    }
    let directory = tiny.write_with(&tensors);
    let write = |name: &str, value: &Value| {
        std::fs::write(directory.path().join(name), value.to_string()).expect("a writable directory");
    };
    let id = |word: &str| words.iter().position(|other| other == word).expect("a word");
    let special = |word: &&str| {
        json!({ "id": id(word), "content": word, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    };
    let vocabulary: serde_json::Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
    write("generation_config.json", &json!({ "bos_token_id": 0, "eos_token_id": id(".") }));
    write(
        "tokenizer.json",
        &json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": decoder,
            "added_tokens": SPECIAL.iter().map(special).collect::<Vec<_>>(),
            "pre_tokenizer": pre_tokenizer,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } },
            },
            "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
        }),
    );
    directory
}

/// Parts of the residual stream, by their first element.
const TOKEN: usize = 0;
const BEFORE: usize = CODE;
const TWO_BEFORE: usize = 2 * CODE;
const SAID: usize = 3 * CODE;
const ONES: usize = 4 * CODE;

fn set(tensor: &mut Tensor, code: &[Vec<f32>]) {
    tensor.stored = Stored::F32;
    let name = tensor.name.clone();
    let width = tensor.shape.last().copied().expect("a shape");
    let values = &mut tensor.values;
    if name.ends_with("norm.weight") {
        return values.fill(1.0);
    }
    values.fill(0.0);
    let mut put = |out: usize, input: usize, value: f32| values[out * width + input] = value;
    let half = HEAD / 2;
    match name.as_str() {
        "model.embed_tokens.weight" => {
            for (token, code) in code.iter().enumerate() {
                code.iter().enumerate().for_each(|(element, value)| put(token, TOKEN + element, *value));
                (0..CONSTANT).for_each(|element| put(token, ONES + element, 1.0));
            }
        }
        "lm_head.weight" => {
            for (token, code) in code.iter().enumerate() {
                code.iter().enumerate().for_each(|(element, value)| put(token, SAID + element, *value));
            }
        }
        // Position m − n of query and key turns each pair by (m − n)·frequency − angle: most alike where the
        // angles are those of the distance wanted.
        "model.layers.0.self_attn.q_proj.weight" => {
            for head in 0..QUERY_HEADS {
                (0..half).for_each(|pair| put(head * HEAD + pair, ONES, SHARP));
            }
        }
        "model.layers.0.self_attn.k_proj.weight" => {
            for head in 0..KV_HEADS {
                for pair in 0..half {
                    let angle = (head + 1) as f64 * THETA.powf(-(pair as f64) / half as f64);
                    put(head * HEAD + pair, ONES, SHARP * angle.cos() as f32);
                    put(head * HEAD + half + pair, ONES, SHARP * angle.sin() as f32);
                }
            }
        }
        "model.layers.1.self_attn.q_proj.weight" => {
            for head in 0..QUERY_HEADS {
                compared(&mut |place, element| {
                    put(head * HEAD + place, [TOKEN, BEFORE][element / CODE] + element % CODE, SHARP)
                });
            }
        }
        "model.layers.1.self_attn.k_proj.weight" => {
            for head in 0..KV_HEADS {
                compared(&mut |place, element| {
                    put(head * HEAD + place, [BEFORE, TWO_BEFORE][element / CODE] + element % CODE, SHARP)
                });
            }
        }
        _ if name.ends_with("v_proj.weight") => {
            for head in 0..KV_HEADS {
                (0..CODE).for_each(|element| put(head * HEAD + element, TOKEN + element, 1.0));
            }
        }
        _ if name.ends_with("o_proj.weight") => {
            let layer_0 = name.contains("layers.0");
            for head in 0..QUERY_HEADS {
                let kv_head = head / (QUERY_HEADS / KV_HEADS);
                let part = if layer_0 { [BEFORE, TWO_BEFORE][kv_head] } else { SAID };
                (0..CODE).for_each(|element| put(part + element, head * HEAD + element, 0.5));
            }
        }
        _ => {}
    }
}

/// The places of a head that hardly turn, and the elements of two codes that go there.
fn compared(put: &mut dyn FnMut(usize, usize)) {
    let half = HEAD / 2;
    let quarter = half / 2;
    for element in 0..2 * CODE {
        let place = if element < CODE { quarter + element } else { half + quarter + element - CODE };
        put(place, element);
    }
}
