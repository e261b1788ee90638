//! What every driver checks of a cache of lists before it launches.

use std::ops::Range;

use super::{
    DType, Error,
    check::{self, Presence, Shape, range},
};
use crate::abi::{Cache, Pages, Rows};

/// Checks the sizes of a cache and returns the number of its lists.
pub(super) fn lists(cache: &Cache) -> Result<u32, Error> {
    for (what, size) in [
        ("cache.sequences", cache.sequences.into()),
        ("cache.heads", cache.heads.into()),
        ("cache.capacity", cache.capacity.into()),
        ("cache.rows", cache.rows),
    ] {
        if size < 0 {
            return Err(Error::argument(what, size, "0 or more"));
        }
    }
    check::entries("cache.capacity", i64::from(cache.capacity))?;
    let lists = i64::from(cache.sequences) * i64::from(cache.heads);
    if lists > i64::from(i32::MAX) {
        return Err(Error::argument("cache.sequences * cache.heads", lists, format!("at most {}", i32::MAX)));
    }
    Ok(lists as u32)
}

/// Checks pages that reach `tokens` of each sequence, and returns the addresses of their table.
pub(super) fn pages(
    name: &str,
    pages: &Pages,
    sequences: i32,
    tokens: (&str, i32),
) -> Result<Range<u64>, Error> {
    for (what, size) in
        [("pages", pages.pages), ("page_size", pages.page_size), ("table_pages", pages.table_pages)]
    {
        if size <= 0 {
            return Err(Error::argument(format!("{name}.{what}"), size, "1 or more where there are pages"));
        }
    }
    slots(name, pages.pages, pages.page_size)?;
    let reach = i64::from(pages.table_pages) * i64::from(pages.page_size);
    if i64::from(tokens.1) > reach {
        let expected = format!("at most {name}.table_pages * {name}.page_size = {reach}");
        return Err(Error::argument(tokens.0, tokens.1, expected));
    }
    let table = i128::from(sequences) * i128::from(pages.table_pages);
    range(&format!("{name}.table"), pages.table, table, 4, Presence::Needed)
}

/// The shape of keys or values, which are described by sequences, as they are stored in pages, and the addresses of
/// the table; `names` of the tokens of each and of their `cu_seqlens`.
pub(super) fn in_pages(
    pages: &Pages,
    shape: Shape,
    names: [&str; 2],
    cu_seqlens: u64,
) -> Result<(Shape, Range<u64>), Error> {
    if cu_seqlens != 0 {
        return Err(Error::argument(names[1], format_args!("{cu_seqlens:#x}"), "0 where there are pages"));
    }
    let table = self::pages("pages", pages, shape.sequences, (names[0], shape.tokens))?;
    Ok((Shape { sequences: pages.pages, tokens: pages.page_size, ..shape }, table))
}

/// Slots of all pages, which kernels count in 32 bits.
pub(super) fn slots(name: &str, pages: i32, page_size: i32) -> Result<i32, Error> {
    let slots = i64::from(pages) * i64::from(page_size);
    i32::try_from(slots).map_err(|_| {
        Error::argument(format!("{name}.pages * {name}.page_size"), slots, format!("at most {}", i32::MAX))
    })
}

/// The addresses of a cache, by their names.
pub(super) struct Spans {
    /// K and V, which may lie between each other. Empty where there is no entry.
    pub(super) entries: Vec<(&'static str, Range<u64>)>,
    /// Lengths and positions, which grow as lists do.
    pub(super) state: [(&'static str, Range<u64>); 2],
    /// What says where lists lie, which nothing writes.
    pub(super) places: [(&'static str, Range<u64>); 3],
}

/// Checks the lists, which are not none, and returns what they span. Where they are `written` no two entries may be the
/// same memory.
pub(super) fn check(cache: &Cache, width: u32, dtype: DType, written: bool) -> Result<Spans, Error> {
    let lists = i128::from(cache.sequences) * i128::from(cache.heads);
    let capacity = i128::from(cache.capacity);
    let paged = cache.pages.table != 0;
    let (rows, lengths, table) = if paged {
        let table = pages("cache.pages", &cache.pages, cache.sequences, ("cache.capacity", cache.capacity))?;
        for (what, address) in [("cache.starts", cache.starts), ("cache.capacities", cache.capacities)] {
            if address != 0 {
                let value = format_args!("{address:#x}");
                return Err(Error::argument(what, value, "0 where the cache is paged"));
            }
        }
        let slots = i128::from(cache.pages.pages) * i128::from(cache.pages.page_size);
        (slots * i128::from(cache.heads), i128::from(cache.sequences), table)
    } else {
        if cache.starts == 0 && i128::from(cache.rows) < lists * capacity {
            let expected =
                format!("sequences * heads * capacity = {} or more where starts is absent", lists * capacity);
            return Err(Error::argument("cache.rows", cache.rows, expected));
        }
        (cache.rows.into(), lists, 0..0)
    };
    let lengths = range("cache.lengths", cache.lengths, lengths, 4, Presence::Needed)?;
    let starts = range("cache.starts", cache.starts, lists, 8, Presence::Optional)?;
    let capacities = range("cache.capacities", cache.capacities, lists, 4, Presence::Optional)?;
    let positions = range("cache.positions", cache.positions, rows, 4, Presence::Optional)?;
    let mut spans = Spans {
        entries: Vec::new(),
        state: [("cache.lengths", lengths), ("cache.positions", positions)],
        places: [("cache.starts", starts), ("cache.capacities", capacities), ("cache.pages.table", table)],
    };
    if rows == 0 || capacity == 0 {
        return Ok(spans);
    }
    let span = |name, tensor: &Rows| {
        let Cache { heads, pages: Pages { pages, page_size, .. }, .. } = *cache;
        if paged {
            let shape = Shape { sequences: pages, heads, tokens: page_size, width, dtype, packed: false };
            let check = if written { check::rows_apart } else { check::rows };
            return check(name, tensor, shape);
        }
        // There may be more rows than a token axis has: two of them show the stride.
        let shape = Shape { sequences: 1, heads: 1, tokens: rows.min(2) as i32, width, dtype, packed: false };
        check::rows(name, tensor, shape)?;
        let elements = (rows - 1) * i128::from(tensor.token_stride) + i128::from(width);
        range(name, tensor.base, elements, dtype.bytes(), Presence::Vectors)
    };
    spans.entries = vec![("cache.k", span("cache.k", &cache.k)?), ("cache.v", span("cache.v", &cache.v)?)];
    Ok(spans)
}
