//! Makes a history that goes wrong shorter, as long as it goes wrong in the same way.

use super::player::{Stage, Wrong};
use super::step::Step;

/// Leaves out what can be left out: first stretches of steps, then single ones.
pub async fn shrink(stage: &Stage, mut steps: Vec<Step>, mut wrong: Wrong) -> (Vec<Step>, Wrong) {
    steps.truncate(wrong.at + 1);
    let mut stretch = steps.len() / 2;
    while stretch > 0 {
        let mut at = 0;
        let mut shorter = false;
        while at < steps.len() {
            let rest = [&steps[..at], &steps[(at + stretch).min(steps.len())..]].concat();
            match stage.play(&rest).await {
                Err(still) if still.kind() == wrong.kind() => {
                    steps = rest;
                    steps.truncate(still.at + 1);
                    wrong = still;
                    shorter = true;
                }
                _ => at += stretch,
            }
        }
        if !shorter || stretch > 1 {
            stretch /= 2;
        }
    }
    (steps, wrong)
}
