package issuer

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/base64"
	"fmt"
	"math"
	"time"

	"inkan/scope"
)

// A kill list is short-lived, and made anew for whoever asks once it is this old.
const (
	killListLifetime = 10 * time.Minute
	killListRefresh  = 2 * time.Second
)

// KillOrder is what an administrator asks to be stopped.
type KillOrder struct {
	Scope  scope.KillScope `json:"scope"`
	Agent  string          `json:"agent,omitzero"` // name; needed for the scope agent, and allowed for venue
	Venue  string          `json:"venue,omitzero"`
	Reason string          `json:"reason"`
}

// addKill stops what an administrator says. It is in every list from then on.
func (i *Issuer) addKill(ctx context.Context, o KillOrder) (*scope.IssuedKill, error) {
	var raw [12]byte
	_, _ = rand.Read(raw[:]) // it ends the program before it would return an error
	now := i.now().UTC().Truncate(time.Second)
	k := &scope.IssuedKill{ID: base64.RawURLEncoding.EncodeToString(raw[:]), Scope: o.Scope, Venue: o.Venue, Reason: o.Reason, Since: now}
	if o.Agent != "" {
		k.Agent = "spiffe://" + i.config.TrustDomain + "/agent/" + o.Agent
	}
	if err := k.Validate(); err != nil {
		return nil, fmt.Errorf("kill: %w: %w", ErrInvalid, err)
	}
	err := i.store.inTx(ctx, func(tx *sql.Tx) error {
		var n int
		if o.Agent != "" {
			if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM agent WHERE name = ?", o.Agent).Scan(&n); err != nil {
				return err
			}
			if n == 0 {
				return fmt.Errorf("agent %.80q: %w", o.Agent, ErrNotFound)
			}
		}
		if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM kill WHERE lifted IS NULL").Scan(&n); err != nil {
			return err
		}
		if n >= scope.MaxKills {
			return fmt.Errorf("kill: %w: %d are in force, and no more fit into the list: lift those that have become needless, or stop the firm", ErrInvalid, n)
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO kill(id, scope, agent, venue, reason, since) VALUES(?, ?, ?, ?, ?, ?)", k.ID, string(k.Scope), k.Agent, k.Venue, k.Reason, k.Since.Unix()); err != nil {
			return err
		}
		kills, err := killsIn(ctx, tx)
		if err != nil {
			return err
		}
		if err := (&scope.KillList{Number: math.MaxInt64, ThisUpdate: now, NextUpdate: now, Kills: kills}).Fits(); err != nil {
			return fmt.Errorf("kill: %w: %w: give a shorter reason, or lift kills that have become needless", ErrInvalid, err)
		}
		return event(ctx, tx, Event{Time: now, Kind: "killed", Agent: o.Agent, Detail: fmt.Sprintf("%s %s %s: %s", k.ID, k.Scope, k.Venue, k.Reason)})
	})
	i.forgetKills()
	return k, err
}

// liftKill takes a kill off the list. A signer that took it over stays stopped
// until a controller re-arms it.
func (i *Issuer) liftKill(ctx context.Context, id string) error {
	now := i.now()
	err := i.store.inTx(ctx, func(tx *sql.Tx) error {
		r, err := tx.ExecContext(ctx, "UPDATE kill SET lifted = ? WHERE id = ? AND lifted IS NULL", now.Unix(), id)
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return fmt.Errorf("kill %.80q: %w", id, ErrNotFound)
		}
		return event(ctx, tx, Event{Time: now, Kind: "kill lifted", Detail: id})
	})
	i.forgetKills()
	return err
}

// kills lists those in force, the oldest first.
func (s *store) kills(ctx context.Context) ([]scope.IssuedKill, error) { return killsIn(ctx, s.db) }

func killsIn(ctx context.Context, q queryer) ([]scope.IssuedKill, error) {
	return list(ctx, q, func(r *sql.Rows) (k scope.IssuedKill, err error) {
		var since int64
		err = r.Scan(&k.ID, &k.Scope, &k.Agent, &k.Venue, &k.Reason, &since)
		k.Since = time.Unix(since, 0).UTC()
		return k, err
	}, "SELECT id, scope, agent, venue, reason, since FROM kill WHERE lifted IS NULL ORDER BY since, id")
}

func (i *Issuer) forgetKills() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.killList = ""
}

// KillList returns the list of kills that are in force, signed by the CA's key.
func (i *Issuer) KillList(ctx context.Context) (string, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now().UTC()
	if i.killList != "" && now.Before(i.killListUntil) && !now.Before(i.killListMade) {
		return i.killList, nil
	}
	kills, err := i.store.kills(ctx)
	if err != nil {
		return "", err
	}
	l := &scope.KillList{Number: scope.Counter(i.number(ctx, now)), ThisUpdate: now.Truncate(time.Second), NextUpdate: now.Add(killListLifetime).Truncate(time.Second), Kills: kills}
	text, err := l.Sign(i.key)
	if err != nil {
		return "", fmt.Errorf("signing the kill list: %w", err)
	}
	i.killList, i.killListMade, i.killListUntil = text, now, now.Add(killListRefresh)
	return text, nil
}
