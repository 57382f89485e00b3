//! nDCG@10, MRR@10 and recall@k, defined as in `trec_eval` (`ndcg_cut.10`, `recip_rank`, `recall.k`); the reciprocal rank has a
//! cutoff at 10, as in MS MARCO.

/// The cutoff rank of nDCG and MRR.
const CUTOFF: usize = 10;

/// The measures of one ranking, or their means over several rankings. All are in [0, 1].
#[derive(Debug, Clone, PartialEq)]
pub struct Measures {
    /// Normalized discounted cumulative gain at 10 (Järvelin and Kekäläinen 2002), with gain = relevance and discount =
    /// log2(rank + 1). 0 without a relevant document.
    pub ndcg_10: f64,
    /// Reciprocal rank of the first relevant document (Voorhees 1999); 0 when it is below rank 10. The mean is the MRR.
    pub mrr_10: f64,
    /// For each requested k, the fraction of the relevant documents that are among the first k. 0 without a relevant document.
    pub recall: Vec<f64>,
}

impl Measures {
    /// Measures a ranking.
    ///
    /// `ranked` is the relevance of each document, best first. `relevant` is the relevance of every relevant document, whether
    /// in the ranking or not, in any order. `recall_at` lists the values of k.
    pub fn of(ranked: &[u32], relevant: &[u32], recall_at: &[usize]) -> Self {
        let mut ideal = relevant.to_vec();
        ideal.sort_unstable_by(|a, b| b.cmp(a));
        let best = dcg(&ideal);
        let first = ranked.iter().take(CUTOFF).position(|&relevance| relevance > 0);
        let all = relevant.iter().filter(|&&relevance| relevance > 0).count().max(1) as f64;
        let found = |k: usize| ranked.iter().take(k).filter(|&&relevance| relevance > 0).count() as f64;
        Self {
            ndcg_10: if best > 0.0 { dcg(ranked) / best } else { 0.0 },
            mrr_10: first.map_or(0.0, |rank| 1.0 / (rank + 1) as f64),
            recall: recall_at.iter().map(|&k| found(k) / all).collect(),
        }
    }

    /// The means over topics; `None` for no topics.
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

/// Discounted cumulative gain of the relevances in rank order.
fn dcg(ranked: &[u32]) -> f64 {
    ranked
        .iter()
        .take(CUTOFF)
        .enumerate()
        .map(|(rank, &relevance)| f64::from(relevance) / ((rank + 2) as f64).log2())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_relevant_document_at_ranks_1_3_and_11() {
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
    fn graded_relevance_with_a_relevant_document_outside_the_ranking() {
        // DCG = 1 + 3 / log2(3); the ideal order of 3, 2, 1 is 3 + 2 / log2(3) + 1 / 2.
        let measures = Measures::of(&[1, 3, 0], &[1, 2, 3], &[2]);
        let log3 = 3f64.log2();
        assert!((measures.ndcg_10 - (1.0 + 3.0 / log3) / (3.0 + 2.0 / log3 + 0.5)).abs() < 1e-12);
        assert_eq!(measures.recall, [2.0 / 3.0]);
        assert_eq!(Measures::of(&[0, 0], &[], &[1]), Measures { ndcg_10: 0.0, mrr_10: 0.0, recall: vec![0.0] });
    }
}
