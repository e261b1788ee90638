//! What every driver checks before it launches: sizes, strides, addresses, and that outputs lie apart.

use std::ops::Range;

use super::{DType, Error};
use crate::abi::{self, Rows};

/// Bytes of a vector access.
pub(super) const VECTOR: u64 = abi::VECTOR_BYTES as u64;

/// What CUDA allows a grid along y and z.
pub(super) const MAX_GRID_YZ: u32 = 65_535;

/// Above every model there is, and low enough that a kernel counts the bytes of a row in 32 bits.
const MAX_ROW_BYTES: u64 = 1 << 30;

/// The same of elements of any type, and low enough for a grid with a piece a thread.
const MAX_WIDTH: u32 = 1 << 26;

/// Bytes of a row of `elements`, which are whole vectors.
pub(super) fn row_bytes(what: &str, elements: u32, dtype: DType) -> Result<i32, Error> {
    let bytes = u64::from(elements) * u64::from(dtype.bytes());
    if bytes == 0 || !bytes.is_multiple_of(VECTOR) || bytes > MAX_ROW_BYTES {
        let unit = VECTOR / u64::from(dtype.bytes());
        let most = MAX_ROW_BYTES / u64::from(dtype.bytes());
        return Err(Error::argument(
            what,
            elements,
            format!("a multiple of {unit} from {unit} to {most} for {dtype:?}"),
        ));
    }
    Ok(bytes as i32)
}

/// The shape behind an [`abi::Rows`].
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) sequences: i32,
    pub(super) heads: i32,
    /// Of each sequence, or of all together where `packed`.
    pub(super) tokens: i32,
    pub(super) width: u32,
    pub(super) dtype: DType,
    /// Whether sequences lie one after the other along the token axis.
    pub(super) packed: bool,
}

/// Checks a tensor of at least one row and returns the addresses it spans.
pub(super) fn rows(name: &str, rows: &Rows, shape: Shape) -> Result<Range<u64>, Error> {
    let Shape { sequences, heads, tokens, width, dtype, packed } = shape;
    let field = |field: &str| format!("{name}.{field}");
    let unit = VECTOR as i64 / i64::from(dtype.bytes());
    for (what, stride) in [
        ("sequence_stride", rows.sequence_stride),
        ("head_stride", rows.head_stride),
        ("token_stride", rows.token_stride),
    ] {
        if stride < 0 || stride % unit != 0 {
            let expected = format!("0 or a positive multiple of {unit} for {dtype:?} (16 bytes)");
            return Err(Error::argument(field(what), stride, expected));
        }
    }
    if packed && rows.sequence_stride != 0 {
        let expected = "0 where cu_seqlens packs the sequences along the token axis";
        return Err(Error::argument(field("sequence_stride"), rows.sequence_stride, expected));
    }
    if tokens > 1 && rows.token_stride < i64::from(width) {
        let expected = format!("{width} or more: rows must not overlap");
        return Err(Error::argument(field("token_stride"), rows.token_stride, expected));
    }
    let elements = last(sequences, rows.sequence_stride)
        + last(heads, rows.head_stride)
        + last(tokens, rows.token_stride)
        + i128::from(width);
    range(name, rows.base, elements, dtype.bytes(), Presence::Vectors)
}

/// Checks a tensor that is written, no two rows of which may be the same memory: threads would race for it.
pub(super) fn rows_apart(name: &str, tensor: &Rows, shape: Shape) -> Result<Range<u64>, Error> {
    let span = rows(name, tensor, shape)?;
    let field = |field: &str| format!("{name}.{field}");
    let [sequence, head, token] = [field("sequence_stride"), field("head_stride"), field("token_stride")];
    let sequences = if shape.packed { 1 } else { shape.sequences };
    let axes = [
        (sequence.as_str(), tensor.sequence_stride, sequences.into()),
        (head.as_str(), tensor.head_stride, shape.heads.into()),
        (token.as_str(), tensor.token_stride, shape.tokens.into()),
    ];
    span_apart(axes, shape.width, "rows must not overlap")?;
    Ok(span)
}

/// Checks a matrix `[rows, width]` of at least one row and returns the addresses it spans.
pub(super) fn matrix(
    name: &str,
    matrix: &Rows,
    [height, width]: [u32; 2],
    dtype: DType,
) -> Result<Range<u64>, Error> {
    let shape = Shape { sequences: 1, heads: 1, tokens: height as i32, width, dtype, packed: false };
    rows(name, matrix, shape)
}

/// Checks a count that a kernel holds in an i32.
pub(super) fn count(what: &str, count: u32) -> Result<i32, Error> {
    i32::try_from(count).map_err(|_| Error::argument(what, count, format!("at most {}", i32::MAX)))
}

/// Checks the tokens of an axis, or the entries that a list has room for: kernels count them in i32, and may overshoot by
/// a tile.
pub(super) fn entries(what: &str, entries: i64) -> Result<(), Error> {
    const MOST: i64 = 1 << 30;
    if entries > MOST {
        return Err(Error::argument(what, entries, format!("at most {MOST}")));
    }
    Ok(())
}

/// Checks a width that a kernel takes in pieces of eight elements.
pub(super) fn pieces(what: &str, width: u32) -> Result<i32, Error> {
    let piece = abi::PIECE as u32;
    if width == 0 || !width.is_multiple_of(piece) || width > MAX_WIDTH {
        let expected = format!("a multiple of {piece} from {piece} to {MAX_WIDTH}");
        return Err(Error::argument(what, width, expected));
    }
    Ok(width as i32)
}

/// Checks that no two rows of `width` elements, `(name, stride, size)` along each axis, are the same memory, and
/// returns the elements from the first of all to the end of the last.
pub(super) fn span_apart<const AXES: usize>(
    mut axes: [(&str, i64, i128); AXES],
    width: u32,
    why: &str,
) -> Result<i128, Error> {
    axes.sort_by_key(|(_, stride, _)| *stride);
    let mut extent = i128::from(width);
    for (what, stride, size) in axes.into_iter().filter(|(_, _, size)| *size > 1) {
        if i128::from(stride) < extent {
            return Err(Error::argument(what, stride, format!("{extent} or more: {why}")));
        }
        extent += i128::from(stride) * (size - 1);
    }
    Ok(extent)
}

/// Offset of the last step along an axis.
pub(super) fn last(size: i32, stride: i64) -> i128 {
    i128::from(size - 1) * i128::from(stride)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// May be 0; aligned to its element otherwise.
    Optional,
    /// Not 0, aligned to its element.
    Needed,
    /// Not 0, aligned for vector accesses.
    Vectors,
}

/// Checks an address and returns what `elements` from there on span. Kernels compute offsets in i64.
pub(super) fn range(
    what: &str,
    base: u64,
    elements: i128,
    bytes: u32,
    presence: Presence,
) -> Result<Range<u64>, Error> {
    let align = if presence == Presence::Vectors { VECTOR } else { bytes.into() };
    if base == 0 && presence == Presence::Optional {
        return Ok(0..0);
    }
    if base == 0 || !base.is_multiple_of(align) {
        let expected = format!("a device address, a multiple of {align}");
        return Err(Error::argument(what, format_args!("{base:#x}"), expected));
    }
    let end = i128::from(base) + elements * i128::from(bytes);
    if end > i128::from(i64::MAX) {
        let expected = format!("{elements} elements of {bytes} bytes below 2^63");
        return Err(Error::argument(what, format_args!("{base:#x}"), expected));
    }
    Ok(base..end as u64)
}

/// A multiple of which the addresses of workspaces, and of their parts, are.
pub(super) const WORKSPACE_ALIGNMENT: u64 = 256;

/// The addresses of a workspace of `bytes`, of which `needed` are, as the function of that name says.
pub(super) fn workspace(address: u64, bytes: usize, needed: usize, says: &str) -> Result<Range<u64>, Error> {
    if needed == 0 {
        return Ok(0..0);
    }
    if address == 0 || !address.is_multiple_of(WORKSPACE_ALIGNMENT) {
        let expected = format!("a device address, a multiple of {WORKSPACE_ALIGNMENT}");
        return Err(Error::argument("workspace", format_args!("{address:#x}"), expected));
    }
    if bytes < needed {
        let expected = format!("{needed} or more, as {says} says");
        return Err(Error::argument("workspace_bytes", bytes, expected));
    }
    range("workspace", address, needed as i128, 1, Presence::Needed)
}

pub(super) fn disjoint(
    what: &str,
    range: &Range<u64>,
    other_name: &str,
    other: &Range<u64>,
) -> Result<(), Error> {
    if range.start < other.end && other.start < range.end {
        let value = format!("{:#x}..{:#x}", range.start, range.end);
        let expected = format!("apart from {other_name}, {:#x}..{:#x}", other.start, other.end);
        return Err(Error::argument(what, value, expected));
    }
    Ok(())
}

/// That no output overlaps an input or another output.
pub(super) fn apart(outputs: &[(&str, Range<u64>)], inputs: &[(&str, Range<u64>)]) -> Result<(), Error> {
    for (number, (name, output)) in outputs.iter().enumerate() {
        for (other_name, other) in inputs.iter().chain(&outputs[..number]) {
            disjoint(name, output, other_name, other)?;
        }
    }
    Ok(())
}

/// Checks that each output is apart from all inputs. Outputs may lie between each other, as K and V do.
pub(super) fn each_apart(outputs: &[(&str, Range<u64>)], inputs: &[(&str, Range<u64>)]) -> Result<(), Error> {
    outputs.iter().try_for_each(|output| apart(std::slice::from_ref(output), inputs))
}
