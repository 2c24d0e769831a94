-- KEYS: counter, keys; ARGV: owner, ttl in ms. Returns 1, or 0 where one is not the owner's.
for i = 2, #KEYS do
	local v = redis.call('GET', KEYS[i])
	if not v or string.sub(v, string.find(v, '[ +]') + 1) ~= ARGV[1] then
		return 0
	end
end
for i = 2, #KEYS do
	redis.call('PEXPIRE', KEYS[i], ARGV[2])
end
return 1
