//! Who enters the running batch next: by priority, then fairly between tenants, then by arrival.
//!
//! Within a priority the tenants take turns by deficit round robin on tokens (Shreedhar and Varghese, "Efficient fair
//! queuing using deficit round robin", SIGCOMM 1995): each turn adds a quantum to what a tenant may enter, a request
//! costs its prompt and the tokens it may generate, and what it did not generate is paid back. So a tenant that floods
//! the queue waits for its own requests only, and every tenant of a priority moves on.
//!
//! Invariants: a request stands in the queue once, by its first choice; further choices are kept aside until the prompt
//! they share is computed and then enter free of charge. Preempted sequences stand before the others of their priority.
//! Priorities are strict: a lower number goes first as long as there is any.

use std::collections::{BTreeMap, VecDeque};

use crate::batch::SequenceId;

/// A request in the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    pub(crate) sequence: SequenceId,
    /// Lower goes first.
    pub(crate) priority: i64,
    pub(crate) tenant: String,
    /// Tokens that it may compute and generate, all choices together.
    pub(crate) cost: usize,
    /// Choices after the first.
    pub(crate) further: u32,
}

#[derive(Debug, Default)]
struct Lane {
    tickets: VecDeque<Ticket>,
    credit: usize,
}

#[derive(Debug, Default)]
struct Level {
    /// Paid for already: preempted sequences and further choices, head first.
    ready: VecDeque<SequenceId>,
    lanes: BTreeMap<String, Lane>,
    /// Tenants of `lanes`; the front one has its turn.
    turns: VecDeque<String>,
}

impl Level {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.lanes.is_empty()
    }

    /// Whose turn it is, with enough credit for the first of its requests.
    fn peek(&mut self, quantum: usize) -> Option<SequenceId> {
        if let Some(ready) = self.ready.front() {
            return Some(*ready);
        }
        loop {
            let tenant = self.turns.front()?.clone();
            let lane = self.lanes.get_mut(&tenant)?;
            let ticket = lane.tickets.front()?;
            if lane.credit >= ticket.cost {
                return Some(ticket.sequence);
            }
            // Alone, it need not wait for turns that nobody else takes.
            let missing = ticket.cost - lane.credit;
            lane.credit += match self.turns.len() {
                1 => missing,
                _ => quantum.max(1),
            };
            self.turns.rotate_left(1);
        }
    }

    fn forget_lane(&mut self, tenant: &str) {
        if self
            .lanes
            .get(tenant)
            .is_some_and(|lane| lane.tickets.is_empty())
        {
            self.lanes.remove(tenant);
            self.turns.retain(|other| other != tenant);
        }
    }
}

/// What waits.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    quantum: usize,
    levels: BTreeMap<i64, Level>,
    /// Only what belongs to requests that have begun may enter.
    holds_new: bool,
    /// By first choice: priority and the further choices that wait for its prompt.
    aside: BTreeMap<SequenceId, (i64, Vec<SequenceId>)>,
}

impl Queue {
    /// An empty queue whose tenants enter `quantum` tokens in a turn.
    pub(crate) fn new(quantum: usize) -> Self {
        Self {
            quantum,
            ..Self::default()
        }
    }

    pub(crate) fn push(&mut self, ticket: Ticket) {
        let first = ticket.sequence;
        if ticket.further > 0 {
            let further =
                (1..=u64::from(ticket.further)).map(|choice| SequenceId(first.0 + choice));
            self.aside
                .insert(first, (ticket.priority, further.collect()));
        }
        let level = self.levels.entry(ticket.priority).or_default();
        if !level.lanes.contains_key(&ticket.tenant) {
            level.turns.push_back(ticket.tenant.clone());
        }
        let lane = level.lanes.entry(ticket.tenant.clone()).or_default();
        lane.tickets.push_back(ticket);
    }

    /// A sequence that gave its blocks back comes before all others of its priority.
    pub(crate) fn push_preempted(&mut self, sequence: SequenceId, priority: i64) {
        let level = self.levels.entry(priority).or_default();
        level.ready.push_front(sequence);
    }

    /// Lets further choices in whose first one `has_computed_its_prompt`, or is gone.
    pub(crate) fn release(&mut self, has_computed_its_prompt: impl Fn(SequenceId) -> bool) {
        let released: Vec<SequenceId> = self
            .aside
            .keys()
            .copied()
            .filter(|first| has_computed_its_prompt(*first))
            .collect();
        for first in released {
            if let Some((priority, further)) = self.aside.remove(&first) {
                self.levels
                    .entry(priority)
                    .or_default()
                    .ready
                    .extend(further);
            }
        }
    }

    /// Who enters next; stays in the queue until [`Self::take`].
    pub(crate) fn peek(&mut self) -> Option<SequenceId> {
        if self.holds_new {
            return self.begun();
        }
        let quantum = self.quantum;
        self.levels
            .values_mut()
            .find_map(|level| level.peek(quantum))
    }

    /// Keeps requests that have not begun waiting, or no longer.
    pub(crate) fn hold_new(&mut self, holds: bool) {
        self.holds_new = holds;
    }

    /// The first sequence of a request that has begun: what is paid for already.
    pub(crate) fn begun(&self) -> Option<SequenceId> {
        let mut ready = self.levels.values().map(|level| level.ready.front());
        ready.find_map(|first| first.copied())
    }

    /// Takes out what [`Self::peek`] gave and charges its tenant.
    pub(crate) fn take(&mut self, sequence: SequenceId) {
        let found = self.levels.iter_mut().find_map(|(priority, level)| {
            if level.ready.front() == Some(&sequence) {
                level.ready.pop_front();
                return Some(*priority);
            }
            let tenant = level.turns.front()?.clone();
            let lane = level.lanes.get_mut(&tenant)?;
            let ticket = lane.tickets.front().filter(|t| t.sequence == sequence)?;
            lane.credit = lane.credit.saturating_sub(ticket.cost);
            lane.tickets.pop_front();
            level.forget_lane(&tenant);
            Some(*priority)
        });
        self.forget_level(found);
    }

    /// A tenant whose request ended before it had used what it was charged gets the rest back, while it has others.
    pub(crate) fn refund(&mut self, priority: i64, tenant: &str, tokens: usize) {
        let level = self.levels.get_mut(&priority);
        if let Some(lane) = level.and_then(|level| level.lanes.get_mut(tenant)) {
            lane.credit = lane.credit.saturating_add(tokens);
        }
    }

    /// A sequence ended: it waits no more.
    pub(crate) fn remove(&mut self, sequence: SequenceId) {
        for (_, further) in self.aside.values_mut() {
            further.retain(|other| *other != sequence);
        }
        let mut emptied = None;
        for (priority, level) in &mut self.levels {
            level.ready.retain(|other| *other != sequence);
            let holder = level.lanes.iter_mut().find_map(|(tenant, lane)| {
                let at = lane.tickets.iter().position(|t| t.sequence == sequence)?;
                lane.tickets.remove(at);
                Some(tenant.clone())
            });
            if let Some(tenant) = holder {
                level.forget_lane(&tenant);
            }
            if level.is_empty() {
                emptied = Some(*priority);
            }
        }
        self.forget_level(emptied);
    }

    fn forget_level(&mut self, priority: Option<i64>) {
        if let Some(priority) = priority
            && self.levels.get(&priority).is_some_and(Level::is_empty)
        {
            self.levels.remove(&priority);
        }
    }

    /// Sequences in the queue.
    pub(crate) fn len(&self) -> usize {
        let entries = self.levels.values().map(|level| {
            level.ready.len() + level.lanes.values().map(|l| l.tickets.len()).sum::<usize>()
        });
        entries.sum::<usize>() + self.deferred()
    }

    /// Of those, further choices that wait for the prompt of their first.
    pub(crate) fn deferred(&self) -> usize {
        self.aside.values().map(|(_, further)| further.len()).sum()
    }

    fn tickets(&self) -> impl Iterator<Item = &Ticket> {
        let lanes = self.levels.values().flat_map(|level| level.lanes.values());
        lanes.flat_map(|lane| &lane.tickets)
    }

    /// Tokens that the waiting requests cost.
    pub(crate) fn tokens(&self) -> usize {
        self.tickets().map(|ticket| ticket.cost).sum()
    }

    /// Waiting sequences and tokens of one tenant, and how many tenants wait, this one included.
    pub(crate) fn share(&self, tenant: &str) -> (usize, usize, usize) {
        let own = self.tickets().filter(|ticket| ticket.tenant == tenant);
        let (sequences, tokens) = own.fold((0, 0), |(sequences, tokens), ticket| {
            (
                sequences + 1 + ticket.further as usize,
                tokens + ticket.cost,
            )
        });
        let mut tenants: Vec<&str> = self.tickets().map(|t| t.tenant.as_str()).collect();
        tenants.push(tenant);
        tenants.sort_unstable();
        tenants.dedup();
        (sequences, tokens, tenants.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket(sequence: u64, tenant: &str, cost: usize) -> Ticket {
        Ticket {
            sequence: SequenceId(sequence),
            priority: 0,
            tenant: tenant.to_owned(),
            cost,
            further: 0,
        }
    }

    fn next(queue: &mut Queue) -> Option<u64> {
        let sequence = queue.peek()?;
        assert_eq!(queue.peek(), Some(sequence), "looking changes nothing");
        queue.take(sequence);
        Some(sequence.0)
    }

    #[test]
    fn lower_priorities_go_first_and_preempted_ones_before_their_like() {
        let mut queue = Queue::new(10);
        for (sequence, priority) in [(0, 0), (1, -5), (2, 0), (3, 7)] {
            queue.push(Ticket {
                priority,
                ..ticket(sequence, "", 10)
            });
        }
        queue.push_preempted(SequenceId(9), 0);
        let order: Vec<u64> = std::iter::from_fn(|| next(&mut queue)).collect();
        assert_eq!(order, [1, 9, 0, 2, 3]);
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn while_new_requests_are_held_only_what_has_begun_enters() {
        let mut queue = Queue::new(10);
        queue.push(Ticket {
            priority: -1,
            ..ticket(0, "", 10)
        });
        queue.push_preempted(SequenceId(9), 0);
        queue.hold_new(true);
        assert_eq!((next(&mut queue), next(&mut queue)), (Some(9), None));
        queue.hold_new(false);
        assert_eq!(next(&mut queue), Some(0));
    }

    #[test]
    fn a_tenant_that_floods_the_queue_waits_for_itself() {
        let mut queue = Queue::new(10);
        for sequence in 0..20 {
            queue.push(ticket(sequence, "flood", 10));
        }
        queue.push(ticket(100, "other", 10));
        queue.push(ticket(101, "other", 10));
        let order: Vec<u64> = std::iter::from_fn(|| next(&mut queue)).collect();
        let at = |sequence| order.iter().position(|other| *other == sequence).unwrap();
        assert!(at(100) <= 2 && at(101) <= 4, "{order:?}");
        assert_eq!(order.len(), 22);
    }

    #[test]
    fn further_choices_wait_aside_and_enter_free_of_charge() {
        let mut queue = Queue::new(10);
        queue.push(Ticket {
            further: 2,
            ..ticket(0, "", 30)
        });
        assert_eq!((queue.len(), queue.deferred(), queue.tokens()), (3, 2, 30));
        assert_eq!(next(&mut queue), Some(0));
        assert_eq!(next(&mut queue), None);
        queue.remove(SequenceId(1));
        queue.release(|_| true);
        assert_eq!((next(&mut queue), next(&mut queue)), (Some(2), None));
    }

    proptest! {
        /// While two tenants both wait, what they were let in differs by no more than the theory says.
        #[test]
        fn tenants_of_a_priority_get_equal_tokens_while_they_wait(
            costs in proptest::collection::vec((0usize..3, 1usize..60), 1..120),
            quantum in 1usize..80,
        ) {
            let names = ["a", "b", "c"];
            let mut queue = Queue::new(quantum);
            for (sequence, (tenant, cost)) in costs.iter().enumerate() {
                queue.push(ticket(sequence as u64, names[*tenant], *cost));
            }
            let present: Vec<usize> = (0..3).filter(|t| costs.iter().any(|(tenant, _)| tenant == t)).collect();
            let total = |t: usize| costs.iter().filter(|(tenant, _)| *tenant == t).map(|(_, cost)| cost).sum::<usize>();
            let mut served = [0; 3];
            let mut count = 0;
            while let Some(sequence) = next(&mut queue) {
                let (tenant, cost) = costs[sequence as usize];
                served[tenant] += cost;
                count += 1;
                for &left in &present {
                    for &right in &present {
                        if served[left] < total(left) && served[right] < total(right) {
                            prop_assert!(served[left].abs_diff(served[right]) <= 2 * (quantum + 60));
                        }
                    }
                }
            }
            prop_assert_eq!(count, costs.len());
        }
    }
}
