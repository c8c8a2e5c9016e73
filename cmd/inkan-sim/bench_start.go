package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"inkan/audit"
	"inkan/scope"
)

// startTail is how many entries the signer may have recorded since it last kept
// what they lead to (audit, bookEvery): those that a start after kill -9 reads.
const startTail = 500_000

// started is how long it took to open a record.
type started struct {
	What    string        `json:"what"`
	Records int           `json:"records"`
	Took    time.Duration `json:"took_ns"`
}

// runBenchStart measures how long a signer takes to open a record with that many
// orders of one day.
func runBenchStart(ctx context.Context, out io.Writer, records int, asJSON bool) error {
	if records <= startTail {
		return fmt.Errorf("--records %d: more than %d are expected", records, startTail)
	}
	dir, err := os.MkdirTemp("", "start")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "log.db")
	var rows []started
	open := func(what string) error {
		begun := time.Now()
		l, err := audit.Open(ctx, path, audit.Options{})
		if err != nil {
			return err
		}
		size := int(l.Head().Size)
		rows = append(rows, started{what, size, time.Since(begun)})
		begun = time.Now()
		if err := l.Close(); err != nil {
			return err
		}
		rows = append(rows, started{what + ", and closing it", size, time.Since(begun)})
		return nil
	}
	b := &bulk{path: path, begun: time.Now().Add(-20 * time.Hour).UTC().Truncate(time.Microsecond), step: 20 * time.Hour / time.Duration(records)}
	l, err := audit.Open(ctx, path, audit.Options{}) // makes the tables
	if err != nil {
		return err
	}
	if err := l.Close(); err != nil {
		return err
	}
	begun := time.Now()
	if err := b.write(records - startTail); err != nil {
		return err
	}
	if err := open("every entry read"); err != nil {
		return err
	}
	if err := b.write(startTail); err != nil {
		return err
	}
	if !asJSON {
		fmt.Fprintf(out, "%d records made in %s, %d cores\n", records, time.Since(begun).Round(time.Second), runtime.NumCPU())
	}
	if err := open(fmt.Sprintf("after kill -9, %d entries read", startTail)); err != nil {
		return err
	}
	if err := open("after a stop in order"); err != nil {
		return err
	}
	if asJSON {
		return printJSON(out, rows)
	}
	for _, r := range rows {
		fmt.Fprintf(out, "%-45s %9d records  %s\n", r.What, r.Records, r.Took.Round(time.Millisecond))
	}
	if fi, err := os.Stat(path + ".book"); err == nil {
		fmt.Fprintf(out, "what is kept beside the record has %d MB\n", fi.Size()>>20)
	}
	return nil
}

// bulk writes orders into a record as the signer would have, and faster: nothing is
// synced, signed or checked.
type bulk struct {
	path  string
	begun time.Time
	step  time.Duration

	n        uint64
	previous [32]byte
	hashes   map[int64]tlog.Hash // those that later ones are made of
}

func (b *bulk) write(count int) error {
	db, err := sql.Open("sqlite", "file:"+b.path+"?_pragma=journal_mode(WAL)&_pragma=synchronous(OFF)&_pragma=cache_size(-200000)")
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	if b.hashes == nil {
		b.hashes = make(map[int64]tlog.Hash)
	}
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, x := range indexes {
			h, ok := b.hashes[x]
			if !ok {
				var raw []byte
				if err := db.QueryRow("SELECT hash FROM hash WHERE idx = ?", x).Scan(&raw); err != nil {
					return nil, fmt.Errorf("hash %d: %w", x, err)
				}
				copy(h[:], raw)
			}
			out[i] = h
		}
		return out, nil
	})
	var st *scope.Statement
	var last time.Time
	for left := count; left > 0; {
		batch := min(left, 50_000)
		left -= batch
		tx, err := db.Begin()
		if err != nil {
			return err
		}
		leaf, err := tx.Prepare("INSERT INTO leaf(counter, id, payload, statement) VALUES(?, ?, ?, ?)")
		if err != nil {
			return err
		}
		hash, err := tx.Prepare("INSERT INTO hash(idx, hash) VALUES(?, ?)")
		if err != nil {
			return err
		}
		fresh := make(map[int64]tlog.Hash)
		for range batch {
			if st, err = b.statement(st); err != nil {
				return err
			}
			raw, err := st.Marshal()
			if err != nil {
				return err
			}
			payload := sha256.Sum256(raw)
			if _, err := leaf.Exec(int64(b.n), st.ID, payload[:], raw); err != nil {
				return err
			}
			list, err := tlog.StoredHashesForRecordHash(int64(b.n-1), tlog.RecordHash(raw), tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
				out := make([]tlog.Hash, len(indexes))
				for i, x := range indexes {
					if h, ok := fresh[x]; ok {
						out[i] = h
					} else if h, ok := b.hashes[x]; ok {
						out[i] = h
					} else {
						return nil, fmt.Errorf("hash %d is not at hand", x)
					}
				}
				return out, nil
			}))
			if err != nil {
				return err
			}
			first := tlog.StoredHashIndex(0, int64(b.n-1))
			for i, h := range list {
				fresh[first+int64(i)] = h
				if _, err := hash.Exec(first+int64(i), h[:]); err != nil {
					return err
				}
			}
			b.previous, last = sha256.Sum256(raw), st.Time.Time
		}
		if err := tx.Commit(); err != nil {
			return err
		}
		// The edge of the tree is all that the next ones need.
		for x, h := range fresh {
			b.hashes[x] = h
		}
		edge := make(map[int64]tlog.Hash)
		if _, err := tlog.TreeHash(int64(b.n), tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
			out, err := read(indexes)
			for i, x := range indexes {
				if err == nil {
					edge[x] = out[i]
				}
			}
			return out, err
		})); err != nil {
			return err
		}
		b.hashes = edge
	}
	root, err := tlog.TreeHash(int64(b.n), read)
	if err != nil {
		return err
	}
	_, err = db.Exec("INSERT OR REPLACE INTO head(one, size, root, previous, time) VALUES(1, ?, ?, ?, ?)", int64(b.n), root[:], b.previous[:], last.UnixMicro())
	return err
}

// statement is the next order.
func (b *bulk) statement(last *scope.Statement) (*scope.Statement, error) {
	b.n++
	var id [16]byte
	binary.BigEndian.PutUint64(id[8:], b.n)
	if last == nil {
		a, err := scope.ParseAction([]byte(order(encode(id[:]))))
		if err != nil {
			return nil, err
		}
		notional, err := scope.ParseDecimal("24496")
		if err != nil {
			return nil, err
		}
		last = &scope.Statement{Version: 1, Issuer: "CN=bench", Agent: "spiffe://example.org/agent/mm-07", Audience: a.Audience, Kind: a.Kind, Order: a.Order, Party: a.Party,
			Decision:    scope.Decision{Decision: scope.DecisionPermit, Notional: &scope.Amount{Amount: notional, Currency: "EUR"}},
			Attestation: scope.Attestation{Evidence: "00", Time: scope.Timestamp{Time: b.begun}}}
	}
	st := *last
	o := *last.Order
	o.ClOrdID = fmt.Sprintf("A-%d", b.n)
	st.Order = &o
	at := b.begun.Add(time.Duration(b.n) * b.step).Truncate(time.Microsecond)
	st.ID, st.Counter, st.Previous, st.Time, st.Expires = encode(id[:]), scope.Counter(b.n), b.previous, scope.Timestamp{Time: at}, at.Unix()+30
	return &st, nil
}
