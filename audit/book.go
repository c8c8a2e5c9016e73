package audit

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"inkan/scope"
)

// What limits over time need of the entries can be kept beside the record, in a
// file of its own, so that a start does not read a day's entries again. It is no
// truth of its own: it is bound to the entry up to which it goes, the entries after
// that one are read, and a file that does not fit is left aside. Without it a start takes longer.

// bookBatch is how many entries are read at a time.
const bookBatch = 10_000

// maxBook bounds after how many entries the file is renewed while the log is open.
const maxBook = 500_000

// bookEvery is after how many it is renewed at first; later after a twentieth of
// those that there are, since the file has grown. lastBook is for how many it is
// renewed when the log is closed. Tests change them.
var bookEvery, lastBook uint64 = 50_000, 10_000

func bookFile(path string) string { return path + ".book" }

// errNoBook: there is no file that fits.
var errNoBook = errors.New("there is no book that fits the record")

// bookOf reads what is kept of a record, and up to which entry it goes.
func (l *Log) bookOf(ctx context.Context, head Head) (*scope.Book, uint64, error) {
	b, err := os.ReadFile(bookFile(l.path))
	if errors.Is(err, os.ErrNotExist) {
		return nil, 0, errNoBook
	}
	if err != nil {
		return nil, 0, err
	}
	var kept scope.KeptBook
	if err := kept.UnmarshalBinary(b); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", errNoBook, err)
	}
	counter := uint64(kept.UpTo)
	if counter == 0 || counter > head.Size {
		return nil, 0, errNoBook
	}
	st, raw, err := l.at(ctx, counter)
	if err != nil {
		return nil, 0, err
	}
	if sha256.Sum256(raw) != kept.Entry || st.Time.Time.Before(head.Time.Add(-scope.MaxWindow)) {
		return nil, 0, errNoBook
	}
	return kept.Book, counter, nil
}

// keepBook writes what is kept. A file that is cut off does not fit, so it is not synced.
func keepBook(path string, book *scope.Book, counter uint64, entry [32]byte) error {
	b, err := (&scope.KeptBook{Book: book, UpTo: scope.Counter(counter), Entry: entry}).AppendBinary(make([]byte, 0, 1<<20))
	if err != nil {
		return err
	}
	name := bookFile(path)
	if err := os.WriteFile(name+".new", b, 0o600); err != nil {
		return errors.Join(err, os.Remove(name+".new")) // where the disk is full, the record needs the room
	}
	return os.Rename(name+".new", name)
}

// at reads one entry.
func (l *Log) at(ctx context.Context, counter uint64) (*scope.Statement, []byte, error) {
	var b []byte
	if err := l.db.QueryRowContext(ctx, "SELECT statement FROM leaf WHERE counter = ?", int64(counter)).Scan(&b); err != nil {
		return nil, nil, fmt.Errorf("entry %d: %w", counter, err)
	}
	st, err := scope.ParseStatement(b)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: entry %d: %w", ErrDamaged, counter, err)
	}
	return st, b, nil
}

// bookUpTo returns what the entries up to that of a head lead to, from what is
// kept and the entries after it.
func (l *Log) bookUpTo(ctx context.Context, head Head) (*scope.Book, uint64, error) {
	book, from, err := l.bookOf(ctx, head)
	if err != nil {
		return nil, 0, err
	}
	last, _, err := l.at(ctx, head.Size)
	if err != nil {
		return nil, 0, err
	}
	lasting, err := l.lasting(ctx, last)
	if err != nil {
		return nil, 0, err
	}
	for _, st := range lasting {
		if uint64(st.Counter) <= from {
			book.Recall(st)
		}
	}
	if err := l.count(ctx, book, from+1, head.Size); err != nil {
		return nil, 0, err
	}
	return book, from, nil
}

// count replays the entries with the numbers from first to last, some at a time.
func (l *Log) count(ctx context.Context, book *scope.Book, first, last uint64) error {
	for next := first; next <= last; next += bookBatch {
		list, err := l.Statements(ctx, next, min(next+bookBatch-1, last))
		if err != nil {
			return err
		}
		statements, err := scope.ParseStatements(list)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		for _, st := range statements {
			if st.Controls != book.Lasting() {
				return fmt.Errorf("%w: entry %d names another event before it than there is", ErrDamaged, st.Counter)
			}
			book.Replay(st)
		}
	}
	return nil
}

// keeper renews the file that is kept while the log is open, on a book of its own:
// the writer is not held up.
type keeper struct {
	upTo    atomic.Uint64 // entry up to which the file goes
	running atomic.Bool
	ended   sync.WaitGroup
}

// renewBook begins to renew the file if there are many entries after it. Only the writer calls it.
func (l *Log) renewBook(head Head) {
	k := &l.keeper
	upTo := k.upTo.Load()
	if head.Size < upTo+min(max(bookEvery, upTo/20), maxBook) || !k.running.CompareAndSwap(false, true) {
		return
	}
	k.ended.Go(func() {
		defer k.running.Store(false)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		ended := make(chan struct{})
		defer close(ended)
		go func() {
			select {
			case <-l.stop:
				cancel() // it is written at the end
			case <-ended:
			}
		}()
		book, _, err := l.bookUpTo(ctx, head)
		if errors.Is(err, errNoBook) {
			book, err = l.replay(ctx, head)
		}
		if err == nil {
			err = keepBook(l.path, book, head.Size, head.Previous)
		}
		if err == nil || ctx.Err() == nil {
			k.upTo.Store(head.Size) // if it could not be, it is tried again with later entries
		}
	})
}

// lastBookOf keeps what the writer has when the log is closed, unless its book
// was asked for a moment after the last entry: it may have forgotten what was open then.
func (l *Log) lastBookOf(head Head) {
	l.keeper.ended.Wait()
	if l.Err() == nil && !l.seen.After(head.Time) && head.Size >= l.keeper.upTo.Load()+lastBook {
		_ = keepBook(l.path, l.book, head.Size, head.Previous) // without it the next start takes longer
	}
}
