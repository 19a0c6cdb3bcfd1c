//! A value that threads read once per batch and that changes rarely.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// An immutable value that can be replaced as a whole. Readers hold a clone of the `Arc` and look at one atomic
/// counter to know whether it is still the newest.
#[derive(Debug)]
pub struct Shared<T> {
    generation: AtomicU64,
    value: Mutex<Arc<T>>,
}

/// A reader's copy of a [`Shared`] value.
#[derive(Debug)]
pub struct Cached<T> {
    generation: u64,
    value: Arc<T>,
}

impl<T> Shared<T> {
    /// A cell that holds `value`.
    pub fn new(value: T) -> Self {
        Self { generation: AtomicU64::new(0), value: Mutex::new(Arc::new(value)) }
    }

    /// The newest value.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the value; readers see it from their next batch on.
    pub fn set(&self, value: Arc<T>) {
        let mut held = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        *held = value;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A copy to read from.
    pub fn cached(&self) -> Cached<T> {
        let held = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        Cached { generation: self.generation.load(Ordering::Acquire), value: Arc::clone(&held) }
    }
}

impl<T> Cached<T> {
    /// The newest value of `shared`.
    pub fn refresh(&mut self, shared: &Shared<T>) -> &Arc<T> {
        if shared.generation.load(Ordering::Acquire) != self.generation {
            *self = shared.cached();
        }
        &self.value
    }
}
