//! Histories that went wrong, as short as they get.

use super::plays;

/// A run removes a row that another had replaced, and keeps its record's content in a second row of that one's. What the second row's content had before it
/// does not come back in the first one's place: the second one has to stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_whose_image_another_run_has_does_not_come_back() {
    plays(
        "b 3=p
         c 3=r
         c 5=p
         run r1 of b by 70
         run r2 of c by 70
         run r3 of b by 70
         roll back r2 forced",
    )
    .await;
}

/// A run found a row unchanged, the next changed it. When the row's writer is taken back first, the row comes back with the last one's rollback all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_found_unchanged_before_it_was_changed() {
    plays(
        "a 1=u
         run r1 of a by 100
         run r2 of a by 100
         a 1=s
         run r3 of a by 100
         roll back r1 forced
         roll back r3",
    )
    .await;
}

/// A row that was removed, written again and removed again: it does not come back as long as who removed it last stands, though who wrote it is taken back.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_removed_twice_whose_writer_is_taken_back() {
    plays(
        "b 1=u
         b 2=q
         c 2=u
         run r1 of b by 100
         run r2 of c by 100
         run r3 of b by 100
         run r4 of c by 100
         roll back r3 forced
         roll back r2 forced if refused",
    )
    .await;
}

/// A row that a run found unchanged was changed by a second run and is made what it had been by a third: the first rests on it no more, and the third's
/// rollback gives the second its row back.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_again_what_was_found_unchanged() {
    plays(
        "a 4=p
         b 4=q
         run r1 of b by 100
         run r2 of b by 100
         run r3 of a by 100
         run r4 of b by 100
         roll back r4 forced if refused",
    )
    .await;
}

/// A chunk removed a row and, done again, wrote what had stood there before: its run's rollback leaves neither an image nor a row behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_removed_and_written_again_by_one_run() {
    plays(
        "b 2=t
         b 3=t
         c 2=q
         c 3=s
         run r1 of b by 1
         run r2 of c by 1
         resume r1
         cancel r2
         run r3 of b by 1
         run r4 of c by 70
         resume r3
         roll back r2 forced if refused
         roll back r4 forced if refused
         roll back r3 forced if refused
         roll back r1 forced if refused",
    )
    .await;
}

/// A row that a forced rollback keeps for another run stands in the way of what it had replaced, until the run that misses that is repaired.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_kept_gives_way_to_a_repair() {
    plays(
        "a 2=u
         b 3=p
         c 2=p
         run r1 of a by 100
         run r2 of c by 1
         run r3 of b by 100
         roll back r2 forced
         reconcile r1
         repair r1
         resume r3
         reconcile r3
         roll back r3 forced if refused
         roll back r1 forced if refused",
    )
    .await;
}

/// What a run wrote over another's row is not an earlier run's row once more, though it has that one's content: the other's row comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_written_over_another_runs_with_an_earlier_content() {
    plays(
        "b 2=t
         b 3=t
         c 2=q
         c 3=s
         run r1 of b by 1
         run r2 of c by 1
         resume r1
         cancel r2
         run r3 of b by 1
         run r4 of c by 70
         resume r3
         roll back r2 forced
         roll back r3",
    )
    .await;
}

/// Two runs found a row unchanged before it was changed: it comes back for the one that is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_two_runs_found_unchanged() {
    plays(
        "a 4=q
         b 4=t
         run r3 of a by 1
         run r4 of a by 100
         run r5 of a by 100
         run r6 of b by 100
         roll back r3 forced if refused
         roll back r5 forced if refused
         roll back r6 forced if refused",
    )
    .await;
}

/// What a removed row was before belongs to who found the row in its place unchanged, since who wrote that one is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_removed_row_below_one_that_is_awaited() {
    plays(
        "b 2=q
         b 1=u
         c 2=u
         run r2 of b by 100
         run r3 of c by 100
         run r4 of b by 70
         run r5 of b by 1
         run r8 of c by 100
         roll back r4 forced if refused
         roll back r3 forced if refused
         roll back r5 forced if refused
         roll back r8 forced if refused",
    )
    .await;
}

/// A row by hand that was replaced comes back though its replacement was found unchanged, changed, and brought back in between.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_by_hand_below_one_that_is_awaited() {
    plays(
        "a 6=u
         b 6=q
         by hand 6=t
         run r1 of a by 100
         run r4 of a by 1
         run r5 of b by 100
         roll back r1 forced if refused
         roll back r5 forced if refused
         roll back r4 forced if refused",
    )
    .await;
}

/// The image of a row that somebody awaits is handed on with whom it waits for.
#[tokio::test(flavor = "multi_thread")]
async fn an_awaited_row_below_another_runs() {
    plays(
        "a 2=x
         b 2=u
         c 2=x
         run r1 of a by 100
         run r2 of c by 100
         run r3 of b by 100
         roll back r1 forced
         run r4 of a by 100
         roll back r3 forced if refused
         roll back r4 forced if refused
         roll back r2 forced if refused",
    )
    .await;
}
