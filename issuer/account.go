package issuer

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"inkan/attest"
	"inkan/journal"
)

// Where a device's TPM testifies to its signatures, a renewal says what they
// were: the host sends its journal since the testimony of the last time, and
// the issuer recomputes the chain (C3).

// How long an exchange may take in all while parts of a journal come, and how
// much of it, in bytes: some three million signatures.
const (
	sessionMax = 10 * time.Minute
	maxJournal = 1 << 30
)

// demandJournal asks for the journal since the testimony on record. Only who has
// the journal knows that testimony: nothing is computed for anybody else (G7).
func (x *session) demandJournal(ak []byte) {
	if len(x.device.testimony) != 32 {
		return
	}
	x.challenge.Testimony = x.device.testimony
	x.span = journal.NewSpan(hex.EncodeToString(ak), [32]byte(x.device.testimony))
}

// serveJournal takes a part of a journal.
func (i *Issuer) serveJournal(w http.ResponseWriter, r *http.Request, who party) {
	if err := i.part(r); err != nil {
		i.decide(w, r, who, nil, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// part adds to an exchange what came of the journal. A part that does not
// stand ends the exchange.
func (i *Issuer) part(r *http.Request) error {
	id, err := hex.DecodeString(r.PathValue("session"))
	if err != nil {
		return &badRequest{errors.New("the session is not in hex")}
	}
	lines, err := io.ReadAll(io.LimitReader(r.Body, journal.MaxPart+1))
	if err != nil {
		return &badRequest{err}
	}
	x := i.sessions.take(i.now(), id)
	switch {
	case x == nil:
		return refuse("Q3", "there is no such exchange: it was answered, took longer than %s, or was never begun", sessionTTL)
	case x.span == nil:
		return refuse("C3", "the journal was not asked for")
	case len(lines) > journal.MaxPart || x.size+len(lines) > maxJournal:
		return refuse("G7", "the journal since the last time comes in parts of at most %d bytes, and has at most %d", journal.MaxPart, maxJournal)
	}
	x.size += len(lines)
	if err := x.span.Append(lines); err != nil {
		return refuse("C3", "%v", err)
	}
	if x.expires = i.now().Add(sessionTTL); x.expires.After(x.latest) {
		x.expires = x.latest
	}
	return i.sessions.put(i.now(), x)
}

// accounted holds the journal against the testimony in accepted evidence (C3).
// The report is nil where there was nothing to hold it against.
func (x *session) accounted(ev *attest.Evidence) (*journal.Report, error) {
	if x.span == nil {
		return nil, nil
	}
	if ev.Audit == nil { // C1 refused it before
		return nil, refuse("C1", "the TPM's testimony about its signatures is missing")
	}
	r, err := x.span.End(journal.TestimonyID(ev.Audit.Attest))
	if err != nil {
		return nil, refuse("C3", "%v", err)
	}
	return r, nil
}

// unknownStill refuses an exchange that was begun when there was no testimony on
// record, if there is one by now: nothing was held against it.
func (x *session) unknownStill(ctx context.Context, tx *sql.Tx) error {
	var known bool
	err := tx.QueryRowContext(ctx, "SELECT testimony IS NOT NULL FROM device WHERE id = ?", x.device.ID).Scan(&known)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return err
	}
	if known && x.span == nil {
		return refuse("C3", "another exchange of this device ended with a testimony meanwhile: begin again")
	}
	return nil
}

// testified says what the TPM said of its signatures, for the decision log.
func testified(t *attest.Testimony, books *journal.Report) string {
	switch {
	case t == nil:
		return "no testimony about signatures"
	case books == nil:
		return fmt.Sprintf("signatures audited from period %d on, digest %x", t.Counter, t.Digest)
	}
	return fmt.Sprintf("signatures audited to period %d, digest %x, %d of them in the journal since the last time", t.Counter, t.Digest, books.Signatures)
}

// unaccounted says about which periods the TPM does not testify; empty: about none.
func unaccounted(books *journal.Report) string {
	if books == nil || len(books.Lost) == 0 {
		return ""
	}
	x := books.Lost[0]
	return clip(fmt.Sprintf("the TPM does not testify to %d periods, the first from %s to %s by the host's clock: %s",
		len(books.Lost), x.After.Format(time.RFC3339), x.Before.Format(time.RFC3339), x.Reason), 512)
}

// resetAudit forgets what a device's TPM testified: its next testimony, or
// none, is taken as it is.
func (s *store) resetAudit(ctx context.Context, id string, now time.Time) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, "UPDATE device SET audit = NULL, testimony = NULL WHERE id = ?", id)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil {
			return err
		} else if n != 1 {
			return fmt.Errorf("device %.80q: %w", id, ErrNotFound)
		}
		return event(ctx, tx, Event{Time: now, Kind: "changed", Device: id, Detail: "what its TPM testified of its signatures is forgotten: the next testimony is held against nothing"})
	})
}
