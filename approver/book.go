package approver

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"sort"

	"inkan/scope"
)

// What limits over time need of an agent's entries is kept beside them, in a
// table of its own, so that a start does not read a day's entries again. It is no truth
// of its own: it is bound to the entry up to which it counts, the entries after that one
// are read, and what does not fit is left aside. Without it a start takes longer.
//
// Books are read and made outside of transactions: a long record takes longer
// than a signer waits, and nobody holds an agent's row for that.

const (
	bookBatch = 1000      // entries that are read at a time, and at most in a transaction
	bookPart  = 256 << 10 // bytes in one row
	maxBook   = 500_000   // entries, see bookEvery
	maxKept   = 4         // kept books of an agent that are looked at: of those that are being written as well
)

// bookEvery is after how many entries a kept book is renewed at first; later
// after a twentieth of those that there are, since it has grown. lastBook is for how many it
// is renewed when the record is closed. Tests change them.
var bookEvery, lastBook uint64 = 50_000, 10_000

// errNoBook: there is no kept book that fits.
var errNoBook = errors.New("there is no kept book that fits the record")

// errBehind: so much was written since this approver looked that it is read
// outside of a transaction.
var errBehind = errors.New("the approver has not counted the latest entries yet")

// queryer is a database or a transaction.
type queryer interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// tally is what an agent's entries lead to, up to one of them.
type tally struct {
	book *scope.Book // nil: to be read
	at   head
}

// reading is the reading of a book that requests wait for.
type reading struct {
	done chan struct{}
	err  error // when it is done
}

// turn waits for the request's turn, and for the agent's book. A book is read on
// when nobody waits for it any more, so that the next request finds it.
func (r *Record) turn(ctx context.Context, l *ledger, agent string) error {
	for {
		select {
		case l.turn <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("waiting for other requests of the agent: %w", ctx.Err())
		}
		if l.book != nil && !l.behind {
			return nil
		}
		if l.reading == nil {
			x := &reading{done: make(chan struct{})}
			from, seen := tally{l.book, l.seen}, l.seen
			if !r.start(func() { x.err = r.read(l, agent, from, &seen); close(x.done) }) {
				<-l.turn
				return sql.ErrConnDone // the record is closed
			}
			l.book, l.reading = nil, x
		}
		x := l.reading
		<-l.turn
		select {
		case <-x.done:
			if x.err != nil {
				return x.err
			}
		case <-ctx.Done():
			return refuse(RuleRecord, "the approver is reading its record of %.200s, which is long: send the action again with the same id", agent)
		}
	}
}

// read reads the agent's book, from a tally or anew, and gives it to the ledger.
func (r *Record) read(l *ledger, agent string, from tally, seen *head) error {
	form, err := r.readOn(l, agent, &from, seen)
	l.turn <- struct{}{}
	l.reading = nil
	if err == nil {
		l.book, l.seen, l.behind = from.book, from.at, false
	}
	<-l.turn
	if form != nil {
		r.start(func() {
			defer l.keeping.Store(false)
			r.keep(r.background, l, agent, from.at.size, form)
		})
	}
	return err
}

// readOn does it, and returns what is to be kept of it, if that is due.
func (r *Record) readOn(l *ledger, agent string, x *tally, seen *head) (form []byte, err error) {
	ctx := r.background
	h, err := r.committed(ctx, agent)
	if err != nil {
		return nil, err
	}
	if err := goesOn(ctx, r.reads, agent, seen, h); err != nil {
		return nil, err
	}
	if x.book == nil {
		kept := uint64(0)
		if *x, kept, err = r.begin(ctx, agent, h); err != nil {
			return nil, err
		}
		l.kept.Store(kept)
	}
	if err := r.countAll(ctx, agent, x, h); err != nil {
		return nil, err
	}
	if l.due(x.at.size) && l.keeping.CompareAndSwap(false, true) {
		if form, err = x.form(); err != nil {
			l.keeping.Store(false)
		}
	}
	return form, err
}

// countAll counts until little is left of what is committed, by others meanwhile as well.
func (r *Record) countAll(ctx context.Context, agent string, x *tally, h *head) error {
	for {
		if err := x.count(ctx, r.reads, agent, h); err != nil {
			return err
		}
		var err error
		if h, err = r.committed(ctx, agent); err != nil || h.size <= x.at.size+bookBatch/2 {
			return err
		}
	}
}

// committed reads an agent's head, and does not hold it.
func (r *Record) committed(ctx context.Context, agent string) (*head, error) {
	var h head
	var previous []byte
	var micros int64
	err := r.reads.QueryRowContext(ctx, "SELECT size, previous, time FROM agent WHERE agent = $1", agent).Scan(&h.size, &previous, &micros)
	if errors.Is(err, sql.ErrNoRows) {
		return &h, nil
	}
	if err != nil {
		return nil, err
	}
	return &h, h.set(previous, micros)
}

// begin is a tally of an agent's entries, as far as one is kept, or without any
// entry that still counts; kept is up to which entry one is kept.
func (r *Record) begin(ctx context.Context, agent string, h *head) (x tally, kept uint64, err error) {
	if h.size == 0 {
		return tally{book: scope.NewBook()}, 0, nil
	}
	last, err := entryAt(ctx, r.reads, agent, h.size)
	if err != nil {
		return x, 0, err
	}
	if last.sum != h.previous {
		return x, 0, damaged(agent, "its head is not that of its last entry")
	}
	lasting, err := lastingEvents(ctx, r.reads, agent, last)
	if err != nil {
		return x, 0, err
	}
	if x, err = r.kept(ctx, agent, h); err == nil {
		for _, j := range lasting {
			if uint64(j.st.Counter) <= x.at.size && j.verdict == verdictEvent {
				x.book.Recall(j.st)
			}
		}
		return x, x.at.size, nil
	}
	if !errors.Is(err, errNoBook) {
		return x, 0, err
	}
	first, err := r.first(ctx, agent, last)
	if err != nil {
		return x, 0, err
	}
	x = tally{scope.NewBook(), head{size: uint64(first.st.Counter) - 1, previous: first.st.Previous}}
	for _, j := range lasting {
		if j.st.Counter < first.st.Counter {
			j.replay(x.book)
		}
	}
	return x, 0, nil
}

// first is the first entry that can still matter after a last one: of the longest
// window, or since the oldest order that is open. Times do not go back in a record, so it is found by halving.
func (r *Record) first(ctx context.Context, agent string, last judged) (judged, error) {
	var begins uint64
	if err := r.reads.QueryRowContext(ctx, "SELECT min(counter) FROM entry WHERE agent = $1", agent).Scan(&begins); err != nil {
		return judged{}, err
	}
	oldest := last.st.Time.Time.Add(-scope.MaxWindow)
	var failed error
	n := begins + uint64(sort.Search(int(uint64(last.st.Counter)-begins), func(i int) bool {
		j, err := entryAt(ctx, r.reads, agent, begins+uint64(i))
		failed = errors.Join(failed, err)
		return err != nil || !j.st.Time.Time.Before(oldest)
	}))
	if failed != nil {
		return judged{}, failed
	}
	if last.st.Open != 0 {
		n = min(n, uint64(last.st.Open))
	}
	return entryAt(ctx, r.reads, agent, n)
}

// kept reads what is kept of an agent's entries up to a head, the latest that fits.
func (r *Record) kept(ctx context.Context, agent string, h *head) (x tally, err error) {
	sizes, err := column[int64](ctx, r.reads, "SELECT DISTINCT size FROM book WHERE agent = $1 AND size <= $2 ORDER BY size DESC LIMIT $3", agent, int64(h.size), maxKept)
	if err != nil {
		return x, err
	}
	for _, size := range sizes {
		parts, err := column[[]byte](ctx, r.reads, "SELECT bytes FROM book WHERE agent = $1 AND size = $2 ORDER BY part", agent, size)
		if err != nil {
			return x, err
		}
		var form []byte
		for _, p := range parts {
			form = append(form, p...)
		}
		var k scope.KeptBook
		if k.UnmarshalBinary(form) != nil || uint64(k.UpTo) != uint64(size) {
			continue // another approver is writing it, or was ended while it did
		}
		j, err := entryAt(ctx, r.reads, agent, uint64(size))
		if err != nil {
			return x, err
		}
		if j.sum == k.Entry && !j.st.Time.Time.Before(h.time.Add(-scope.MaxWindow)) {
			return tally{k.Book, head{uint64(size), j.sum, j.st.Time.Time}}, nil
		}
	}
	return x, errNoBook
}

func column[T any](ctx context.Context, q queryer, query string, args ...any) ([]T, error) {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var out []T
	for rows.Next() {
		var v T
		if err := rows.Scan(&v); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// form is what is kept.
func (x *tally) form() ([]byte, error) {
	return (&scope.KeptBook{Book: x.book, UpTo: scope.Counter(x.at.size), Entry: x.at.previous}).AppendBinary(nil)
}

// due says whether so many entries are there that the kept book is to be renewed.
func (l *ledger) due(size uint64) bool {
	kept := l.kept.Load()
	return size >= kept+min(max(bookEvery, kept/20), maxBook)
}

// renew begins to renew what is kept, if there are many entries after it. It is
// made from what was kept and the entries after that, and no request waits for it.
func (r *Record) renew(l *ledger, agent string, size uint64) {
	if !l.due(size) || !l.keeping.CompareAndSwap(false, true) {
		return
	}
	renewed := func() {
		defer l.keeping.Store(false)
		ctx := r.background
		h, err := r.committed(ctx, agent)
		if err != nil {
			return
		}
		x, kept, err := r.begin(ctx, agent, h)
		var form []byte
		if err == nil {
			if l.kept.Store(kept); !l.due(h.size) {
				return // another approver has done it
			}
			err = x.count(ctx, r.reads, agent, h)
		}
		if err == nil {
			form, err = x.form()
		}
		if err == nil {
			r.keep(ctx, l, agent, h.size, form)
		} else if ctx.Err() == nil {
			l.kept.Store(size) // tried again with later entries
		}
	}
	if !r.start(renewed) {
		l.keeping.Store(false)
	}
}

// keep writes what is kept, in transactions as short as any. One that is cut
// off does not fit. An error is no loss: the next start takes longer.
func (r *Record) keep(ctx context.Context, l *ledger, agent string, size uint64, form []byte) {
	part := 0
	for ; len(form) > 0; part++ {
		n := min(len(form), bookPart)
		if _, err := r.db.ExecContext(ctx, "INSERT INTO book(agent, size, part, bytes) VALUES($1, $2, $3, $4) ON CONFLICT(agent, size, part) DO UPDATE SET bytes = excluded.bytes", agent, int64(size), part, form[:n]); err != nil {
			if ctx.Err() == nil {
				l.kept.Store(size) // tried again with later entries
			}
			return
		}
		form = form[n:]
	}
	_, _ = r.db.ExecContext(ctx, "DELETE FROM book WHERE agent = $1 AND (size < $2 OR size = $2 AND part >= $3)", agent, int64(size), part) // what is left does no harm
	l.kept.Store(size)
}

// start runs f beside the requests, unless the record is closed.
func (r *Record) start(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.running.Go(f)
	return true
}

// keepAll keeps what there is when the record is closed.
func (r *Record) keepAll(ctx context.Context, agents map[string]*ledger) {
	for agent, l := range agents {
		select {
		case l.turn <- struct{}{}:
		case <-ctx.Done():
			return
		}
		if l.book != nil && l.seen.size >= l.kept.Load()+lastBook {
			x := tally{l.book, l.seen}
			if form, err := x.form(); err == nil {
				r.keep(ctx, l, agent, l.seen.size, form)
			}
		}
		<-l.turn
	}
}

// count counts the entries after those that it has, up to a head, some at a time.
func (x *tally) count(ctx context.Context, q queryer, agent string, h *head) error {
	for x.at.size < h.size {
		list, err := entriesOf(ctx, q, agent, x.at.size+1, min(x.at.size+bookBatch, h.size))
		if err != nil {
			return err
		}
		for _, j := range list {
			if uint64(j.st.Counter) != x.at.size+1 || j.st.Previous != scope.Digest(x.at.previous) {
				return damaged(agent, fmt.Sprintf("entry %d does not follow the one before it", x.at.size+1))
			}
			j.replay(x.book)
			x.at = head{uint64(j.st.Counter), j.sum, j.st.Time.Time}
		}
		if len(list) == 0 {
			return damaged(agent, fmt.Sprintf("entry %d is missing", x.at.size+1))
		}
	}
	if x.at.size != h.size || x.at.previous != h.previous {
		return damaged(agent, "its head is not that of its last entry")
	}
	return nil
}

func damaged(agent, how string) error {
	return fmt.Errorf("the record of %.200s is damaged: %s", agent, how)
}

// goesOn refuses a record that does not go on from what this approver has seen
// of it: an older state of it was put in its place.
func goesOn(ctx context.Context, q queryer, agent string, seen, h *head) error {
	back := func() error {
		return refuse(RuleRecord, "the approver's record went back: this approver has seen %d entries of %.200s, now it has others or fewer; when it is known why, restart the approver", seen.size, agent)
	}
	switch {
	case h.size < seen.size, h.size == seen.size && h.previous != seen.previous:
		return back()
	case h.size == seen.size || seen.size == 0:
		return nil
	}
	next, err := entryAt(ctx, q, agent, seen.size+1)
	if err != nil {
		return err
	}
	if [32]byte(next.st.Previous) != seen.previous {
		return back()
	}
	return nil
}

// judged is an entry that was judged before.
type judged struct {
	st      *scope.Statement
	sum     [32]byte
	verdict string
}

// replay counts it: every permit of the signer, whether it is ever authorized or
// not, and the events that this approver takes as well.
func (j *judged) replay(book *scope.Book) {
	if j.st.Decision.Decision == scope.DecisionEvent && j.verdict != verdictEvent {
		book.Pass(j.st)
		return
	}
	book.Replay(j.st)
}

// entryAt reads one entry.
func entryAt(ctx context.Context, q queryer, agent string, counter uint64) (judged, error) {
	list, err := entriesOf(ctx, q, agent, counter, counter)
	switch {
	case err != nil:
		return judged{}, err
	case len(list) == 0:
		return judged{}, damaged(agent, fmt.Sprintf("entry %d is missing", counter))
	case uint64(list[0].st.Counter) != counter:
		return judged{}, damaged(agent, fmt.Sprintf("entry %d is another one", counter))
	}
	return list[0], nil
}

// entriesOf reads entries in their order.
func entriesOf(ctx context.Context, q queryer, agent string, from, to uint64) ([]judged, error) {
	rows, err := q.QueryContext(ctx, "SELECT statement, verdict FROM entry WHERE agent = $1 AND counter BETWEEN $2 AND $3 ORDER BY counter", agent, int64(from), int64(to))
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var texts [][]byte
	var out []judged
	for rows.Next() {
		var b []byte
		var j judged
		if err := rows.Scan(&b, &j.verdict); err != nil {
			return nil, err
		}
		j.sum = sha256.Sum256(b)
		texts, out = append(texts, b), append(out, j)
	}
	if err := errors.Join(rows.Err(), rows.Close()); err != nil {
		return nil, err
	}
	statements, err := scope.ParseStatements(texts)
	if err != nil {
		return nil, damaged(agent, err.Error())
	}
	for i := range out {
		out[i].st = statements[i]
	}
	return out, nil
}

// lastingEvents reads the events whose effect lasts, up to an entry.
func lastingEvents(ctx context.Context, q queryer, agent string, last judged) ([]judged, error) {
	verdicts := map[scope.Counter]string{last.st.Counter: last.verdict}
	list, err := scope.LastingEvents(last.st, func(n scope.Counter) (*scope.Statement, error) {
		j, err := entryAt(ctx, q, agent, uint64(n))
		verdicts[n] = j.verdict
		return j.st, err
	})
	if err != nil {
		return nil, fmt.Errorf("the events of %.200s whose effect lasts: %w", agent, err)
	}
	out := make([]judged, len(list))
	for i, st := range list {
		out[i] = judged{st: st, verdict: verdicts[st.Counter]}
	}
	return out, nil
}
