package approver

import (
	"context"
	"errors"
	"time"

	"inkan/internal/postgres"
	"inkan/scope"
)

// KeepBookEvery changes after how many entries a kept book is renewed, and kept at the end.
func KeepBookEvery(every, last uint64) (undo func()) {
	e, l := bookEvery, lastBook
	bookEvery, lastBook = every, last
	return func() { bookEvery, lastBook = e, l }
}

// Batch is how many entries are read at a time.
const Batch = bookBatch

// BookOf is what the record holds of an agent's entries, as the next request finds it.
func (r *Record) BookOf(ctx context.Context, agent string) (*scope.Book, error) {
	ctx, cancel := context.WithTimeout(ctx, postgres.Patience)
	defer cancel()
	l := r.ledger(agent)
	if err := r.turn(ctx, l, agent); err != nil {
		return nil, err
	}
	defer func() { <-l.turn }()
	return l.book, nil
}

// Counts says whether the record has counted an agent's entries.
func (r *Record) Counts(agent string) bool {
	l := r.ledger(agent)
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	return l.book != nil && !l.behind
}

// Settle waits for what runs beside the requests.
func (r *Record) Settle(agent string) {
	for l := r.ledger(agent); l.keeping.Load(); {
		time.Sleep(time.Millisecond)
	}
}

// Drop ends the record as a process that is killed: nothing is kept.
func (r *Record) Drop() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.end()
	r.running.Wait()
	return errors.Join(r.reads.Close(), r.db.Close())
}

// SetClock has the approver take another time for now.
func (a *Approver) SetClock(now func() time.Time) { a.now = now }
