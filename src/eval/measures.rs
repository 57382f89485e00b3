//! nDCG@10, MRR@10 and recall@k, as trec_eval defines them.

/// Ranks that nDCG and MRR look at.
const DEPTH: usize = 10;

/// The measures of one ranking, or their means over many.
#[derive(Debug, Clone, PartialEq)]
pub struct Measures {
    /// Normalised discounted cumulative gain at 10 (Järvelin & Kekäläinen 2002), gain = relevance, discount log2(rank + 1).
    pub ndcg_10: f64,
    /// 1 / rank of the first relevant document, 0 beyond rank 10.
    pub mrr_10: f64,
    /// For each k that was asked for: the part of the relevant documents among the first k.
    pub recall: Vec<f64>,
}

impl Measures {
    /// Measures a ranking.
    ///
    /// `ranked` holds the relevance of each document, best first. `relevant` holds the relevances of everything that is
    /// relevant, in the ranking or not, in any order.
    pub fn of(ranked: &[u32], relevant: &[u32], recall_at: &[usize]) -> Self {
        let mut ideal = relevant.to_vec();
        ideal.sort_unstable_by(|a, b| b.cmp(a));
        let best = gain(&ideal);
        let first = ranked.iter().take(DEPTH).position(|&relevance| relevance > 0);
        let all = relevant.iter().filter(|&&relevance| relevance > 0).count().max(1) as f64;
        let found = |k: usize| ranked.iter().take(k).filter(|&&relevance| relevance > 0).count() as f64;
        Self {
            ndcg_10: if best > 0.0 { gain(ranked) / best } else { 0.0 },
            mrr_10: first.map_or(0.0, |rank| 1.0 / (rank + 1) as f64),
            recall: recall_at.iter().map(|&k| found(k) / all).collect(),
        }
    }

    /// The mean over topics; `None` without any.
    pub fn mean(all: &[Self]) -> Option<Self> {
        let first = all.first()?;
        let mean = |value: &dyn Fn(&Self) -> f64| all.iter().map(value).sum::<f64>() / all.len() as f64;
        Some(Self {
            ndcg_10: mean(&|m| m.ndcg_10),
            mrr_10: mean(&|m| m.mrr_10),
            recall: (0..first.recall.len()).map(|k| mean(&|m| m.recall[k])).collect(),
        })
    }
}

fn gain(ranked: &[u32]) -> f64 {
    ranked
        .iter()
        .take(DEPTH)
        .enumerate()
        .map(|(rank, &relevance)| f64::from(relevance) / ((rank + 2) as f64).log2())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_relevant_document() {
        let at = |rank: usize| {
            let mut ranked = vec![0; 20];
            ranked[rank - 1] = 1;
            Measures::of(&ranked, &[1], &[1, 5])
        };
        assert_eq!(at(1), Measures { ndcg_10: 1.0, mrr_10: 1.0, recall: vec![1.0, 1.0] });
        assert_eq!(at(3), Measures { ndcg_10: 0.5, mrr_10: 1.0 / 3.0, recall: vec![0.0, 1.0] });
        assert_eq!(at(11), Measures { ndcg_10: 0.0, mrr_10: 0.0, recall: vec![0.0, 0.0] });
    }

    #[test]
    fn graded_relevance_and_documents_that_were_not_retrieved() {
        // DCG = 1 + 3 / log2(3); the ideal order of 3, 2, 1 is 3 + 2 / log2(3) + 1 / 2.
        let measures = Measures::of(&[1, 3, 0], &[1, 2, 3], &[2]);
        let log3 = 3f64.log2();
        assert!((measures.ndcg_10 - (1.0 + 3.0 / log3) / (3.0 + 2.0 / log3 + 0.5)).abs() < 1e-12);
        assert_eq!(measures.recall, [2.0 / 3.0]);
        assert_eq!(Measures::of(&[0, 0], &[], &[1]), Measures { ndcg_10: 0.0, mrr_10: 0.0, recall: vec![0.0] });
    }
}
