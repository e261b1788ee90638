//! Reading JSON objects field by field, with errors that name the file, the field and the value.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::ModelError;

/// Reads a whole file; a missing one is [`ModelError::FileMissing`] with `hint`.
pub(super) fn read(path: &Path, hint: &str) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => {
            ModelError::FileMissing { path: path.to_path_buf(), hint: hint.to_owned() }
        }
        _ => ModelError::Io { path: path.to_path_buf(), source },
    })
}

/// Parses an object; anything else at the top level is an error.
pub(super) fn object(file: &Path, text: &[u8]) -> Result<Map<String, Value>, ModelError> {
    match serde_json::from_slice(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(ModelError::Field {
            file: file.to_path_buf(),
            field: "(top level)".to_owned(),
            value: shown(&other),
            expected: "a JSON object".to_owned(),
        }),
        Err(source) => Err(ModelError::Json { file: file.to_path_buf(), source }),
    }
}

/// A value for a message: as JSON, cut where it is long.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// An object of a file, and where in the file it lies. Null counts as absent throughout, as it does
/// for transformers.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    file: &'a Path,
    /// Dotted path of the object, empty at the top level.
    inside: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { file, inside: "", map }
    }

    /// The object under `field`, or none where it is absent, null or empty.
    pub(super) fn object(&self, field: &'static str) -> Result<Option<Self>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { file: self.file, inside: field, map })),
            Some(_) => Err(self.wrong(field, "an object or null")),
        }
    }

    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether the key is there at all, null or not.
    pub(super) fn has(&self, field: &str) -> bool {
        self.map.contains_key(field)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// A whole number from 1 to `most`.
    pub(super) fn count(&self, field: &str, most: usize) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) if (1..=most).contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(field, &format!("a whole number from 1 to {most}"))),
        }
    }

    pub(super) fn required_count(&self, field: &str, most: usize) -> Result<usize, ModelError> {
        match self.count(field, most)? {
            Some(number) => Ok(number),
            None => Err(self.missing(field, &format!("a whole number from 1 to {most}"))),
        }
    }

    /// A finite number for which `fits` holds; `expected` completes "it must be".
    pub(super) fn number(
        &self,
        field: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number.is_finite() && fits(number) => Ok(Some(number)),
            _ => Err(self.wrong(field, expected)),
        }
    }

    pub(super) fn required_number(
        &self,
        field: &str,
        expected: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<f64, ModelError> {
        match self.number(field, expected, fits)? {
            Some(number) => Ok(number),
            None => Err(self.missing(field, expected)),
        }
    }

    pub(super) fn boolean(&self, field: &str) -> Result<Option<bool>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    pub(super) fn string(&self, field: &str) -> Result<Option<&'a str>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(self.wrong(field, "a string")),
        }
    }

    /// A token id below `vocab_size`.
    pub(super) fn token(&self, field: &str, vocab_size: usize) -> Result<Option<u32>, ModelError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match token(value, vocab_size) {
                Some(id) => Ok(Some(id)),
                None => {
                    Err(self.wrong(field, &format!("a token id below vocab_size = {vocab_size}, or null")))
                }
            },
        }
    }

    /// One token id or a list of them.
    pub(super) fn tokens(&self, field: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, ModelError> {
        let ids = match self.get(field) {
            None => return Ok(None),
            Some(Value::Array(values)) => values.iter().map(|value| token(value, vocab_size)).collect(),
            Some(value) => token(value, vocab_size).map(|id| vec![id]),
        };
        match ids {
            Some(ids) => Ok(Some(ids)),
            None => Err(self.wrong(
                field,
                &format!("a token id below vocab_size = {vocab_size}, a list of such ids, or null"),
            )),
        }
    }

    pub(super) fn missing(&self, field: &str, expected: &str) -> ModelError {
        ModelError::FieldMissing {
            file: self.file.to_path_buf(),
            field: self.path(field),
            expected: expected.to_owned(),
        }
    }

    pub(super) fn wrong(&self, field: &str, expected: &str) -> ModelError {
        ModelError::Field {
            file: self.file.to_path_buf(),
            field: self.path(field),
            value: self.shown(field),
            expected: expected.to_owned(),
        }
    }

    pub(super) fn unsupported(&self, field: &str, supported: &str) -> ModelError {
        ModelError::Unsupported {
            file: self.file.to_path_buf(),
            field: self.path(field),
            value: self.shown(field),
            supported: supported.to_owned(),
        }
    }

    fn shown(&self, field: &str) -> String {
        self.map.get(field).map_or_else(|| "absent".to_owned(), shown)
    }

    fn path(&self, field: &str) -> String {
        if self.inside.is_empty() { field.to_owned() } else { format!("{}.{field}", self.inside) }
    }
}

fn token(value: &Value, vocab_size: usize) -> Option<u32> {
    let id = u32::try_from(value.as_u64()?).ok()?;
    ((id as usize) < vocab_size).then_some(id)
}
