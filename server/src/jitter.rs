//! Randomness that spreads pauses and ages, so that replicas and streams do not act at the same moment.

/// A random number from 0 to 1; 0.5 if the system gives no randomness.
pub fn random() -> f64 {
    let mut bytes = [0_u8; 4];
    if getrandom::fill(&mut bytes).is_err() {
        return 0.5;
    }
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}
