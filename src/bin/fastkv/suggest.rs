//! Names that were mistyped.

/// `; did you mean NAME?` for the name with the fewest changes to a text, where half of it is right.
pub(crate) fn suggestion<S: AsRef<str>>(text: &str, names: &[S]) -> String {
    let nearest = names.iter().map(AsRef::as_ref).min_by_key(|name| distance(text, name));
    match nearest.filter(|name| 2 * distance(text, name) <= text.chars().count()) {
        Some(name) => format!("; did you mean {name}?"),
        None => String::new(),
    }
}

/// Characters put in, left out or changed.
fn distance(text: &str, name: &str) -> usize {
    let name: Vec<char> = name.chars().collect();
    let mut row: Vec<usize> = (0..=name.len()).collect();
    for (above, a) in text.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = above + 1;
        for (index, b) in name.iter().enumerate() {
            let change = diagonal + usize::from(a != *b);
            diagonal = row[index + 1];
            row[index + 1] = change.min(diagonal + 1).min(row[index] + 1);
        }
    }
    row[name.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_found() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(suggestion("doble", &["double", "single"]), "; did you mean double?");
        assert_eq!(suggestion("xyz", &["double", "single"]), "");
    }
}
