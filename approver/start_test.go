package approver_test

import (
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"inkan/approver"
	"inkan/scope"
	"inkan/simulator"
)

// wide is a scope whose limits over time a day's orders do not reach.
var wide = strings.NewReplacer(`"amount":"20000"`, `"amount":"999999999999"`, `"allowed_tif":["0"]`, `"allowed_tif":["0","3"]`, `"rolling_s":3600`, `"rolling_s":86400`).Replace(scopeJSON)

// longDesk is a desk whose agent has a scope as wide.
func longDesk(t testing.TB) *desk {
	t.Helper()
	d := newDesk(t)
	d.limits = wide
	d.agent = d.certify(t, nil)
	return d
}

// fill writes orders into a record's tables as an approver would have, and faster:
// nothing is checked. They are spread over a time that ends now.
func (d *desk) fill(t testing.TB, db *sql.DB, count int, over time.Duration) {
	t.Helper()
	one, err := scope.ParseStatement(d.next(t, "1", func(s *scope.Statement) { s.Order.TimeInForce = "3" }))
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now().Add(-over).UTC().Truncate(time.Microsecond)
	for left := count; left > 0; {
		tx, err := db.BeginTx(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		insert, err := tx.PrepareContext(t.Context(), "INSERT INTO entry(agent, counter, statement, time, verdict, authorized) VALUES($1, $2, $3, $4, 'permit', 1)")
		if err != nil {
			t.Fatal(err)
		}
		for range min(left, 50_000) {
			left--
			d.counter++
			st := *one
			st.ID, st.Counter, st.Previous, st.Time.Time = newID(), scope.Counter(d.counter), d.previous, begun.Add(over/time.Duration(count+1)*time.Duration(count-left)).Truncate(time.Microsecond)
			st.Expires, st.Decision.Utilisation = st.Time.Time.Unix()+30, nil
			b, err := st.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := insert.ExecContext(t.Context(), d.agent.ID, int64(d.counter), b, st.Time.Time.UnixMicro()); err != nil {
				t.Fatal(err)
			}
			d.previous, d.clock = sha256.Sum256(b), st.Time.Time
			d.book.Replay(&st)
		}
		if _, err := tx.ExecContext(t.Context(), "INSERT INTO agent(agent, size, previous, time) VALUES($1, $2, $3, $4) ON CONFLICT(agent) DO UPDATE SET size = excluded.size, previous = excluded.previous, time = excluded.time",
			d.agent.ID, int64(d.counter), d.previous[:], d.clock.UnixMicro()); err != nil {
			t.Fatal(err)
		}
		if err := tx.Commit(); err != nil {
			t.Fatal(err)
		}
	}
}

// peak is the most memory that the process has had since the last call, in MB.
func peak(b *testing.B) float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	var kb int
	_, line, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscan(line, &kb); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		b.Fatal(err)
	}
	return float64(kb) / 1024
}

// processor is the time that the process's threads have had of processors.
func processor(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkStart is the first authorization of an agent with a million entries of one day.
func BenchmarkStart(b *testing.B) {
	const entries = 1_000_000
	for name, open := range map[string]func(d *desk) (*sql.DB, func() *approver.Record){
		"sqlite": func(d *desk) (*sql.DB, func() *approver.Record) {
			path := filepath.Join(b.TempDir(), "r.db")
			db, err := sql.Open("sqlite", "file:"+path+"?_pragma=journal_mode(WAL)&_pragma=synchronous(OFF)")
			if err != nil {
				b.Fatal(err)
			}
			return db, func() *approver.Record {
				r, err := approver.OpenRecord(b.Context(), path)
				if err != nil {
					b.Fatal(err)
				}
				return r
			}
		},
		"postgresql": func(d *desk) (*sql.DB, func() *approver.Record) {
			dir, err := os.MkdirTemp("", "pg") // the database's user gets there
			if err != nil {
				b.Fatal(err)
			}
			server, err := simulator.StartPostgreSQL(b.Context(), dir)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _, _ = server.Close(), os.RemoveAll(dir) })
			db, err := sql.Open("pgx", server.URL())
			if err != nil {
				b.Fatal(err)
			}
			password := filepath.Join(b.TempDir(), "password")
			if err := os.WriteFile(password, []byte(server.Password), 0o600); err != nil {
				b.Fatal(err)
			}
			return db, func() *approver.Record {
				r, err := approver.OpenSharedRecord(b.Context(), "postgres://inkan@/inkan?host="+server.Dir, password)
				if err != nil {
					b.Fatal(err)
				}
				return r
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			d := longDesk(b)
			db, record := open(d)
			if err := record().Close(); err != nil { // it makes the tables
				b.Fatal(err)
			}
			d.fill(b, db, entries, 20*time.Hour)
			if err := db.Close(); err != nil {
				b.Fatal(err)
			}
			for i, what := range []string{"read", "kept"} {
				debug.FreeOSMemory()
				_ = peak(b)
				begun, worked := time.Now(), processor(b)
				r := record()
				d.approver = d.newApprover(b, config(b, ""), r)
				order := d.write(b, d.next(b, "1", func(s *scope.Statement) { s.Expires += 240 })) // it may take long
				refusals := 0
				for {
					err := d.decide(d.request(order))
					if err == nil {
						break
					}
					if !errors.Is(err, &scope.Refusal{Rule: approver.RuleRecord}) {
						b.Fatal(err)
					}
					refusals++
				}
				b.ReportMetric(time.Since(begun).Seconds(), what+"-s")
				b.ReportMetric((processor(b) - worked).Seconds(), what+"-cpu-s")
				b.ReportMetric(peak(b), what+"-MB")
				b.ReportMetric(float64(refusals), what+"-refused")
				begun = time.Now()
				if err := r.Close(); err != nil {
					b.Fatal(err)
				}
				if i == 0 {
					b.ReportMetric(time.Since(begun).Seconds(), "close-s")
				}
			}
		})
	}
}
