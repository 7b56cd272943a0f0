//! Elements of a matrix: owned, or a part of a mapped file.
//!
//! Invariant: a stored slice never moves or changes while it is served. Mapped elements are those of the file, so that
//! processes that map the same file share its pages.

#![allow(unsafe_code)]

use std::ops::Deref;

use engine_load::Mapped;
use half::bf16;

/// A value whose bytes are its meaning: no padding, no reference, every pattern valid.
///
/// # Safety
/// Exactly that, and a size that is a multiple of its alignment.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: four bytes, every pattern is a float.
unsafe impl Plain for f32 {}
// SAFETY: a transparent u16.
unsafe impl Plain for bf16 {}
// SAFETY: 64 bytes, aligned to 64.
unsafe impl Plain for Line {}

/// A cache line.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u8; 64]);

impl Line {
    /// Nothing but zero bits.
    pub const ZERO: Self = Self([0; 64]);
}

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) enum Store<T> {
    Owned(Vec<T>),
    /// Whole elements at an aligned place.
    Mapped(Aligned<T>),
}

/// A part of a mapped file that was checked to hold whole, aligned elements.
#[derive(Clone, Debug)]
pub(crate) struct Aligned<T> {
    bytes: Mapped,
    element: std::marker::PhantomData<T>,
}

impl<T: Plain> Store<T> {
    /// The elements in `bytes`; `None` where they are not whole or not aligned.
    pub fn mapped(bytes: Mapped) -> Option<Self> {
        let (start, length) = (bytes.as_ptr() as usize, bytes.len());
        let fits = start.is_multiple_of(align_of::<T>()) && length.is_multiple_of(size_of::<T>());
        fits.then_some(Self::Mapped(Aligned {
            bytes,
            element: std::marker::PhantomData,
        }))
    }

    /// The bytes as they lie in memory.
    pub fn as_bytes(&self) -> &[u8] {
        let values: &[T] = self;
        // SAFETY: plain values have no padding.
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }
}

impl<T: Plain> Deref for Store<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Owned(values) => values,
            // SAFETY: checked to be whole and aligned when it was made; every pattern is a value.
            Self::Mapped(Aligned { bytes, .. }) => unsafe {
                std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>())
            },
        }
    }
}

impl<T: Plain + PartialEq> PartialEq for Store<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T> From<Vec<T>> for Store<T> {
    fn from(values: Vec<T>) -> Self {
        Self::Owned(values)
    }
}
