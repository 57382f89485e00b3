//! The map from logits to scores.

use serde::Deserialize;

/// A model's map from logits to scores: `sigmoid((logit - subtract) / divide)`, in [0, 1]. Documents are ranked by logit,
/// because scores saturate.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScoreMap {
    /// A finite number.
    pub subtract: f64,
    /// Larger than 0.
    pub divide: f64,
}

impl Default for ScoreMap {
    fn default() -> Self {
        Self { subtract: 0.0, divide: 1.0 }
    }
}

impl ScoreMap {
    /// Computed in f64, so that scores near 1 remain distinct.
    pub fn score(self, logit: f32) -> f64 {
        1.0 / (1.0 + (-(f64::from(logit) - self.subtract) / self.divide).exp())
    }

    /// Whether every finite logit has a score.
    pub fn is_valid(self) -> bool {
        self.subtract.is_finite() && self.divide.is_finite() && self.divide > 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_probabilities() {
        let sigmoid = |logit| ScoreMap::default().score(logit);
        assert_eq!(sigmoid(0.0), 0.5);
        assert!(sigmoid(-200.0) >= 0.0 && sigmoid(200.0) <= 1.0);
        assert!(sigmoid(20.0) < sigmoid(30.0));
    }

    #[test]
    fn a_models_own_map_moves_and_widens_the_sigmoid() {
        let map = ScoreMap { subtract: 4.5, divide: 5.0 };
        assert_eq!(map.score(4.5), 0.5);
        assert_eq!(map.score(9.5), ScoreMap::default().score(1.0));
        assert!(!ScoreMap { subtract: 0.0, divide: 0.0 }.is_valid());
    }
}
