-- The versions of this release, as its migration notes them.
insert into absurd_server.migration (version, name, checksum, min_server)
values (9, '0.2.0', 'bf363ec3619401b062f57339967a1fc30e085faf19559ead623c396e75769576', 2);
insert into absurd_server.setting (name, value)
values ('origin', 'ours'), ('contract_version', '2'), ('doorbell', 'on');
