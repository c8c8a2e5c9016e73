// Package tpm keeps keys in a TPM 2.0: [Open] a device, [Device.CreateKey] and
// [Device.LoadKey], which gives a crypto.Signer. The rest makes evidence for
// package attest.
//
// It does not know what its keys sign. A Device and its keys are safe for
// concurrent use; the TPM itself does one thing at a time. Whatever is loaded
// into the TPM is flushed where it was loaded, but for a few keys and one
// session that are kept for speed, and flushed when idle.
package tpm

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"

	"inkan/attest"
)

// Options of a device.
type Options struct {
	OwnerAuth       []byte // authorization of the owner hierarchy, usually empty
	EndorsementAuth []byte // likewise of the endorsement hierarchy
}

// maxLoaded is how many keys stay loaded. A TPM without a resource manager has
// three places, and loading a key takes a second one for its parent.
const maxLoaded = 2

// maxResident is how many stay loaded when public keys of approvers are among
// them; where a place is needed for a primary key, one is unloaded.
const maxResident = 3

// idle is after what time a socket is left to others: swtpm serves one client
// at a time and has no resource manager.
const idle = 100 * time.Millisecond

// Device is a TPM.
type Device struct {
	options Options

	mu       sync.Mutex // owns whole command sequences, and all below
	link     *link
	epoch    int                  // of the link when the following were loaded
	loaded   []*resident          // with handles in the TPM, the longest unused first
	session  *policySession       // for keys with a policy
	prepared map[string]*prepared // approved policies that were used
	timer    *time.Timer
	closed   bool

	journal Journal // nil: signatures are not kept

	approvals chan struct{}        // one for each signature in approver mode that is under way
	free      []*parked            // sessions for those
	waiting   int                  // sessions that wait for an approver
	externals map[string]*resident // approvers' keys by public area
}

// Open opens the TPM at address: a device such as /dev/tpmrm0, or the path of a
// unix socket of swtpm.
func Open(address string) (*Device, error) { return OpenWith(address, Options{}) }

// OpenWith is Open with options.
func OpenWith(address string, o Options) (*Device, error) {
	l, err := newLink(address)
	if err != nil {
		return nil, err
	}
	d := &Device{options: o, link: l, prepared: make(map[string]*prepared), approvals: make(chan struct{}, approvedSessions), externals: make(map[string]*resident)}
	err = d.do("opening the TPM", func() error {
		_, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTFamilyIndicator), PropertyCount: 1}.Execute(d.link)
		return err
	})
	if err != nil {
		l.close()
		return nil, err
	}
	return d, nil
}

// Close flushes what is loaded and closes the connection. Keys of the device
// fail afterwards. A second Close does nothing.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	d.release()
	return nil
}

var errClosed = errors.New("the TPM was closed")

// do runs a sequence of commands that nobody else interrupts. If the
// connection broke or something loaded was gone, it runs it once more with
// nothing loaded: a TPM that was reset, or a swtpm that was restarted, is then
// in use again. Sequences may therefore run twice; none of them harms by it.
func (d *Device) do(what string, sequence func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("%s: %w", what, errClosed)
	}
	err := d.once(sequence)
	if err != nil && (errors.Is(err, errLink) && !errors.Is(err, ErrTPM12) || gone(err)) {
		d.forget()
		err = d.once(sequence)
	}
	if err != nil && !known(err) {
		// What is still loaded after a failure is uncertain: begin anew.
		d.release()
	}
	d.idleLater()
	return explain(what, err)
}

// known errors leave everything as it was.
func known(err error) bool {
	var p *PCRError
	var e *EpochError
	var a answered
	return errors.As(err, &p) || errors.As(err, &e) || errors.As(err, &a) || errors.Is(err, ErrNoPolicy) || errors.Is(err, errStale)
}

func (d *Device) once(sequence func() error) error {
	if err := d.link.connect(); err != nil {
		return err
	}
	if d.epoch != d.link.epoch {
		// A new connection: what this process had loaded is gone, or is left over
		// in a swtpm that has no resource manager.
		d.forget()
		if d.link.socket {
			if err := d.flushAll(); err != nil {
				return err
			}
		}
		d.epoch = d.link.epoch
	}
	return sequence()
}

// gone says that a handle or session that was thought to be loaded is not.
func gone(err error) bool {
	for _, rc := range []tpm2.TPMRC{tpm2.TPMRCHandle, tpm2.TPMRCReferenceH0, tpm2.TPMRCReferenceH1, tpm2.TPMRCReferenceS0, tpm2.TPMRCReferenceS1, tpm2.TPMRCContextGap} {
		if errors.Is(err, rc) {
			return true
		}
	}
	return false
}

// forget drops what is remembered as loaded, without a command.
func (d *Device) forget() {
	for _, k := range d.loaded {
		k.handle = nil
	}
	d.loaded, d.session, d.free = nil, nil, nil
	d.epoch = -1
}

// release flushes everything and closes the connection.
func (d *Device) release() {
	for _, k := range d.loaded {
		d.flush(k.handle.Handle)
	}
	if d.session != nil {
		d.flush(d.session.Handle())
	}
	d.dropFree()
	d.forget()
	d.link.close()
}

// idleLater leaves a socket to others after a while without use.
func (d *Device) idleLater() {
	if !d.link.socket {
		return
	}
	if d.timer == nil {
		d.timer = time.AfterFunc(idle, func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.waiting > 0 {
				d.timer.Reset(idle) // a session waits for an approver
				return
			}
			d.release()
		})
		return
	}
	d.timer.Reset(idle)
}

// flush frees a handle. If that fails the connection is in doubt, and the next
// one begins with flushAll.
func (d *Device) flush(h tpm2.TPMHandle) {
	if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(d.link); err != nil {
		d.link.close()
	}
}

// Kinds of handles that can be flushed (Part 2, section 7.2).
const (
	loadedSessions = 0x02000000
	savedSessions  = 0x03000000
	transients     = 0x80000000
)

// handles lists the handles of one kind.
func (d *Device) handles(kind uint32) ([]tpm2.TPMHandle, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: kind, PropertyCount: 64}.Execute(d.link)
	if err != nil {
		return nil, err
	}
	h, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, err
	}
	return h.Handle, nil
}

// flushAll frees every transient object and session of a TPM that only this
// process uses.
func (d *Device) flushAll() error {
	for _, kind := range []uint32{transients, loadedSessions, savedSessions} {
		list, err := d.handles(kind)
		if err != nil {
			return err
		}
		for _, h := range list {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(d.link); err != nil {
				return err
			}
		}
	}
	return nil
}

// primary lends a primary key: it is there for the duration of use.
func (d *Device) primary(hierarchy tpm2.TPMHandle, auth []byte, template []byte, use func(h tpm2.NamedHandle, public []byte) error) error {
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](template)
	if err != nil {
		return err
	}
	if err := d.makeRoom(maxLoaded); err != nil {
		return err
	}
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(auth)},
		InPublic:      tpm2.New2B(*public),
	}.Execute(d.link)
	if err != nil {
		return explainHierarchy("making a primary key", err)
	}
	defer d.flush(rsp.ObjectHandle)
	made, err := rsp.OutPublic.Contents()
	if err != nil {
		return err
	}
	return use(tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, tpm2.Marshal(*made))
}

func (d *Device) withSRK(use func(h tpm2.NamedHandle, public []byte) error) error {
	return d.primary(tpm2.TPMRHOwner, d.options.OwnerAuth, attest.SRKTemplate(), use)
}

func (d *Device) withAK(use func(h tpm2.NamedHandle, public []byte) error) error {
	return d.primary(tpm2.TPMRHEndorsement, d.options.EndorsementAuth, attest.AKTemplate(), use)
}

// empty is the empty authorization value for a handle.
func empty(h tpm2.NamedHandle) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: h.Handle, Name: h.Name, Auth: tpm2.PasswordAuth(nil)}
}

// SRKPublic returns the TPMT_PUBLIC of the storage root key.
func (d *Device) SRKPublic() (public []byte, err error) {
	err = d.do("reading the storage root key", func() error {
		return d.withSRK(func(_ tpm2.NamedHandle, p []byte) error { public = p; return nil })
	})
	return public, err
}

// AKPublic returns the TPMT_PUBLIC of the attestation key.
func (d *Device) AKPublic() (public []byte, err error) {
	err = d.do("reading the attestation key", func() error {
		return d.withAK(func(_ tpm2.NamedHandle, p []byte) error { public = p; return nil })
	})
	return public, err
}

// Release flushes what is loaded and closes the connection until the next use,
// so that another program can use a TPM that serves one client at a time.
func (d *Device) Release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.release()
}
